"use strict";
// Turns every <canvas data-solid> with mouse, touch and arrow keys. No library, nothing loaded.
for (const canvas of document.querySelectorAll("canvas[data-solid]")) {
  const solid = JSON.parse(canvas.dataset.solid);
  const pen = canvas.getContext("2d");
  const ink = "#1f2b36", quiet = "#5d6873";
  let [turn, tilt] = solid.look, zoom = 1, held = null;

  const light = (colour) => {
    const part = (at) => parseInt(colour.slice(at, at + 2), 16);
    return 0.299 * part(1) + 0.587 * part(3) + 0.114 * part(5) > 127;
  };
  const turned = ([x, y, z]) => { // about the vertical, then about the horizontal
    const across = x * Math.cos(turn) + z * Math.sin(turn), depth = z * Math.cos(turn) - x * Math.sin(turn);
    return [across, y * Math.cos(tilt) - depth * Math.sin(tilt), y * Math.sin(tilt) + depth * Math.cos(tilt)];
  };
  const size = (points) => Math.max(...points.map((point) => Math.hypot(...point)));
  const reach = Math.max(size(solid.corners), size(solid.atoms.map((atom) => atom.slice(0, 3))) + 0.5);

  function draw() {
    const ratio = window.devicePixelRatio || 1, side = canvas.clientWidth;
    if (!side) return;
    canvas.width = canvas.height = Math.round(side * ratio);
    const scale = zoom * side / 2 / reach, middle = side / 2;
    const flat = (point) => [middle + scale * point[0], middle - scale * point[1]];
    const atoms = solid.atoms.map((atom) => turned(atom)), corners = solid.corners.map(turned);
    const parts = []; // [depth, how to draw it], to be drawn back to front
    const line = (from, to, style, width, dash) => () => {
      pen.beginPath();
      pen.setLineDash(dash);
      pen.strokeStyle = style;
      pen.lineWidth = width;
      pen.moveTo(...flat(from));
      pen.lineTo(...flat(to));
      pen.stroke();
    };
    const back = Math.min(...corners.map((corner) => corner[2]));
    for (const [i, j] of solid.edges) {
      const hidden = Math.min(corners[i][2], corners[j][2]) === back; // the three edges of the far corner
      const depth = hidden ? -1e9 : Math.min(corners[i][2], corners[j][2]) - 0.01; // behind the balls at its ends
      parts.push([depth, line(corners[i], corners[j], quiet, 1, hidden ? [3, 4] : [])]);
    }
    for (const [i, j] of solid.bonds) { // from the surface of one ball to that of the other
      const apart = atoms[i].map((x, k) => atoms[j][k] - x), length = Math.hypot(...apart);
      const from = atoms[i].map((x, k) => x + apart[k] * solid.elements[solid.atoms[i][3]].radius / length);
      const to = atoms[j].map((x, k) => x - apart[k] * solid.elements[solid.atoms[j][3]].radius / length);
      parts.push([(from[2] + to[2]) / 2, line(from, to, "#8a949d", Math.max(1.5, 0.13 * scale), [])]);
    }
    solid.atoms.forEach((atom, at) => {
      const element = solid.elements[atom[3]];
      parts.push([atoms[at][2], () => {
        const [x, y] = flat(atoms[at]), radius = Math.max(2, element.radius * scale);
        pen.setLineDash([]);
        pen.beginPath();
        pen.arc(x, y, radius, 0, 2 * Math.PI);
        pen.fillStyle = element.colour;
        pen.fill();
        pen.lineWidth = 1;
        pen.strokeStyle = ink;
        pen.stroke();
        const inside = radius >= 6; // else beside it
        pen.fillStyle = inside && !light(element.colour) ? "#fff" : ink;
        pen.font = `600 ${Math.min(14, Math.max(8, 0.85 * radius))}px system-ui, sans-serif`;
        pen.textAlign = inside ? "center" : "left";
        pen.fillText(element.symbol, inside ? x : x + radius + 1, y + 0.5);
      }]);
    });
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, side, side);
    pen.textBaseline = "middle";
    parts.sort((one, other) => one[0] - other[0]).forEach(([, paint]) => paint());
    canvas.dataset.look = `${turn.toFixed(3)} ${tilt.toFixed(3)} ${zoom.toFixed(3)}`;
  }

  canvas.addEventListener("pointerdown", (event) => {
    held = [event.pointerId, event.clientX, event.clientY];
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!held || held[0] !== event.pointerId) return;
    turn += (event.clientX - held[1]) / 90;
    tilt += (event.clientY - held[2]) / 90;
    held = [event.pointerId, event.clientX, event.clientY];
    draw();
  });
  for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => { held = null; });
  canvas.addEventListener("dblclick", () => {
    [turn, tilt] = solid.look;
    zoom = 1;
    draw();
  });
  canvas.addEventListener("keydown", (event) => {
    const [across, up, factor] = {
      ArrowLeft: [-1, 0, 1], ArrowRight: [1, 0, 1], ArrowUp: [0, -1, 1], ArrowDown: [0, 1, 1],
      "+": [0, 0, 1.15], "-": [0, 0, 1 / 1.15],
    }[event.key] || [0, 0, 0];
    if (!factor) return;
    turn += across * 0.15;
    tilt += up * 0.15;
    zoom = Math.min(4, Math.max(0.5, zoom * factor));
    event.preventDefault();
    draw();
  });
  new ResizeObserver(draw).observe(canvas);
  draw();
}
