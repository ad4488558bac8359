// Curves are drawn when they come into view; the table of runs is made by DataTables (in itables' bundle).
const options = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
const draw = (chart) => {
  const figure = JSON.parse(document.querySelector(`script[data-for="${chart.id}"]`).textContent);
  if (chart.clientWidth < 480) Object.assign(figure.layout, { legend: { orientation: "h", y: -0.2, font: { size: 11 } } });
  return Plotly.newPlot(chart, figure.data, figure.layout, options);
};
const seen = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries)
    if (isIntersecting) {
      seen.unobserve(target);
      draw(target);
    }
}, { rootMargin: "400px" });
for (const chart of document.querySelectorAll(".curve")) seen.observe(chart);

const contents = document.querySelector("#contents details");
if (window.innerWidth < 1200) {
  contents.open = false;
  for (const link of contents.querySelectorAll("a")) link.addEventListener("click", () => (contents.open = false));
}
window.addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("main details")) folded.open = true;
  for (const chart of document.querySelectorAll(".curve:empty")) {
    seen.unobserve(chart);
    draw(chart);
  }
});

const runs = document.getElementById("runs-data");
if (runs) {
  const url = URL.createObjectURL(new Blob([document.getElementById("tables-js").textContent], { type: "text/javascript" }));
  const { default: DataTable } = await import(url);
  URL.revokeObjectURL(url);
  const { columns, data } = JSON.parse(runs.textContent);
  const text = (value) => String(value).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
  const folder = columns.length; // a hidden last entry
  new DataTable("#all-runs", {
    data,
    columns: columns.map(({ title, kind }, index) => ({
      title,
      className: kind === "number" ? "dt-right" : "dt-left",
      type: kind === "number" ? "num" : "string",
      render: (value, how, row) => {
        if (value === null) return how === "display" ? "" : how === "sort" && kind === "number" ? Infinity : "";
        if (how !== "display") return value;
        return index === 0 ? `<a href="${text(encodeURI(row[folder]))}/">${text(value)}</a>` : text(value);
      },
      columnControl: kind === "choice" ? ["order", ["searchList"]] : ["order", ["search"]],
    })),
    order: [],
    ordering: { indicators: false, handler: false },
    pageLength: 25,
    lengthMenu: [25, 100, 1000],
    deferRender: true,
    autoWidth: false,
    layout: { topStart: "search", topEnd: "info", bottomStart: "pageLength", bottomEnd: "paging" },
    language: { search: "", searchPlaceholder: "Find runs" },
  });
}
document.documentElement.dataset.ready = "true";
