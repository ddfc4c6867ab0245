"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const gallery = byId("gallery"), filter = byId("class-filter"), more = byId("more"), dialog = byId("details");
  const AT_ONCE = 20;
  if (data.pixelated) document.body.classList.add("pixelated");

  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };
  const picture = (place, alt) => make("img", { src: data.pictures[place], alt, loading: "lazy" });
  const className = (place) => (place < 0 ? "another class" : data.classes[place].replace(/^(?=\d+$)/, "class "));
  const runName = (run) => data.runs[run][0];
  const distance = (value) => (value === null ? "" : `, distance ${value.toPrecision(3)} to its nearest exemplar`);
  const label = ([cls, run, index, , , , far, , copy]) =>
    `${className(cls)}, image ${index} of ${runName(run)}${distance(far)}${copy ? ", counts as a copy" : ""}`;

  // The images that Previous and Next walk through: those of the strip or gallery that was opened from.
  let walk = [], at = 0;
  const show = () => {
    const [cls, run, index, pic, file, near, far, nearPicture, copy] = data.images[walk[at]];
    byId("details-title").textContent = `${className(cls)}, image ${index}`;
    byId("details-image").src = data.pictures[pic];
    byId("details-image").alt = `Generated image ${index} of ${className(cls)}`;
    byId("details-near").hidden = nearPicture < 0;
    if (nearPicture >= 0) {
      byId("details-exemplar").src = data.pictures[nearPicture];
      byId("details-exemplar").alt = `Nearest exemplar, ${near}`;
    }
    const facts = [["run", runName(run)], ["file", file]];
    facts.push(["nearest exemplar", near === null ? "no exemplar guided this image" : near]);
    if (far !== null) facts.push(["distance", far.toPrecision(3)]);
    if (copy) facts.push(["counts as", "a copy"]);
    byId("details-facts").replaceChildren(...facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
    byId("previous").disabled = at === 0;
    byId("next").disabled = at === walk.length - 1;
  };
  const open = (places, place) => {
    walk = places;
    at = places.indexOf(place);
    show();
    dialog.showModal();
  };
  const step = (by) => {
    if (at + by < 0 || at + by >= walk.length) return;
    at += by;
    show();
  };
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });

  const strip = (who, tiles) => make("div", { class: "strip" }, make("span", { class: "who" }, who), make("div", { class: "tiles" }, ...tiles));
  const section = (cls) => {
    const parts = [make("h3", {}, className(cls))];
    if (data.exemplars[cls].length) {
      parts.push(strip("exemplars", data.exemplars[cls].map(([name, place]) => make("span", { class: "exemplar" }, picture(place, `Exemplar ${name} of ${className(cls)}`)))));
    }
    data.runs.forEach(([name, same], run) => {
      const own = data.strips[cls][run];
      if (!own.length) return;
      const tiles = own.map((place) => {
        const tile = make("button", { type: "button", class: "tile", "aria-label": label(data.images[place]) }, picture(data.images[place][3], ""));
        tile.addEventListener("click", () => open(own, place));
        return tile;
      });
      parts.push(strip(same ? name : `${name} (other noise)`, tiles));
    });
    return make("section", { "aria-label": className(cls) }, ...parts);
  };

  let shown = 0;
  const status = (text) => { byId("filter-status").textContent = text; };
  const append = () => {
    const last = Math.min(shown + AT_ONCE, data.classes.length);
    for (; shown < last; shown++) gallery.append(section(shown));
    more.hidden = shown >= data.classes.length;
    status(`${shown} of ${data.classes.length} classes`);
  };
  more.addEventListener("click", append);
  filter.addEventListener("change", () => {
    gallery.replaceChildren();
    if (filter.value === "") { shown = 0; append(); return; }
    gallery.append(section(Number(filter.value)));
    more.hidden = true;
    status(`1 of ${data.classes.length} classes`);
  });
  append();

  const copies = byId("copy-gallery");
  if (copies) {
    copies.append(...data.copies.map((place) => {
      const image = data.images[place];
      const two = make("span", { class: "two" }, picture(image[3], ""));
      if (image[7] >= 0) two.append(picture(image[7], ""));
      const pair = make("button", { type: "button", class: "pair", "aria-label": label(image) }, two, `${className(image[0])}: ${image[6] && image[6].toPrecision(3)}${image[8] ? ", copy" : ""}`);
      pair.addEventListener("click", () => open(data.copies, place));
      return pair;
    }));
  }

  byId("copy-recipe").addEventListener("click", async () => {
    const text = byId("recipe").textContent;
    let done = true;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = make("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      done = document.execCommand("copy");
      area.remove();
    }
    byId("copy-status").textContent = done ? "Copied." : "It could not be copied: open the recipe and select it.";
  });
})();
