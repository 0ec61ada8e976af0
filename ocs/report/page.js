// Sorts the tables of a report: each header becomes a button. A layer is a tbody, so that its details move with it.
document.querySelectorAll(".ocs-report:not([data-ready])").forEach((report) => {
  report.dataset.ready = "";
  const keyOf = (body, column) => {
    const cell = body.rows[0].cells[column];
    const key = "key" in cell.dataset ? cell.dataset.key : cell.textContent;
    return key === "" ? null : isNaN(key) ? key : Number(key);
  };
  const compare = (a, b) =>
    typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
  report.querySelectorAll("table.sortable").forEach((table) => {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((each) => each.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const keyed = [...table.tBodies].map((body) => [keyOf(body, column), body]);
        keyed.sort(([a], [b]) =>
          a === null || b === null ? (a === null) - (b === null) : compare(a, b) * (down ? -1 : 1));
        table.append(...keyed.map(([, body]) => body));
      });
    });
  });
});
