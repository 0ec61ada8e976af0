/* log and pow as every glibc since the first has them: the same values as those of glibc 2.29, whose symbols differ
   only in how errors are told, so that a wheel that was built with a new glibc loads where torch does (glibc 2.28). */
#ifndef OCS_GLIBC_H
#define OCS_GLIBC_H

#include <math.h>

#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver log, log@GLIBC_2.2.5\n.symver pow, pow@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver log, log@GLIBC_2.17\n.symver pow, pow@GLIBC_2.17");
#endif

#endif
