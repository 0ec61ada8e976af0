// What the headers of newer compilers call and older systems lack, under its own names, for this library alone.
//
// torch's own wheels run where glibc is 2.28 and libstdc++ that of GCC 8, so should ours (tests/test_build.py reads the
// symbol table). Since then came the constructors of string streams without arguments
// (GLIBCXX_3.4.26) and a flag that spares locks where there is one thread (GLIBC_2.32), all called by torch's headers.
#include <sstream>

#if defined(__GLIBC__) && defined(__GLIBCXX__)
#define HERE __attribute__((visibility("hidden"), used))

extern "C" {

HERE char __libc_single_threaded = 0; // locks are never spared

HERE void
ocs_stringstream(std::stringstream *stream) __asm__("_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev");
HERE void ocs_ostringstream(std::ostringstream *stream) __asm__(
    "_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev");

void ocs_stringstream(std::stringstream *stream) {
    new (stream) std::stringstream(std::ios_base::in | std::ios_base::out);
}

void ocs_ostringstream(std::ostringstream *stream) {
    new (stream) std::ostringstream(std::ios_base::out);
}
}

#endif
