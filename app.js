// The elements of the page that gradio does not have. Each function wires one element once; the
// HTML inside it, which app.py makes, may be replaced at any time.

const COLOR = '#f59e0b';

// Buttons with data-index; onPick(index) is called when one is clicked.
function imageGrid(element, onPick) {
  element.addEventListener('click', event => {
    const button = event.target.closest('button[data-index]');
    if (button) onPick(Number(button.dataset.index));
  });
}

// Shows one of its images at a time; data-loop plays them back and forth. Returns a play function.
function film(element) {
  let timer = null;
  let direction = 1;
  const find = selector => element.querySelector(selector);
  const frames = () => [...element.querySelectorAll('img')];
  const loops = () => find('.film').dataset.loop === '1';
  const show = index => {
    frames().forEach((frame, i) => { frame.hidden = i !== index; });
    find('input').value = index;
    find('output').textContent = frames()[index].alt;
  };
  const pause = () => {
    clearInterval(timer);
    timer = null;
    if (find('button')) find('button').textContent = '▶';
  };
  const next = () => {
    if (!find('input')) return pause();
    const last = frames().length - 1;
    let index = Number(find('input').value) + direction;
    if (index < 0 || index > last) {
      if (!loops()) return pause();
      direction = -direction;
      index += 2 * direction;
    }
    show(Math.min(last, Math.max(0, index)));
  };
  const play = () => {
    if (!loops() && find('input').value === find('input').max) show(0);
    timer = setInterval(next, 120);
    find('button').textContent = '❚❚';
  };
  element.addEventListener('input', event => { pause(); show(Number(event.target.value)); });
  element.addEventListener('click', event => {
    if (event.target.closest('button')) (timer ? pause : play)();
  });
  return () => {
    pause();
    direction = 1;
    const isStill = matchMedia('(prefers-reduced-motion: reduce)').matches;
    if (frames().length > 1 && !isStill && find('.film').dataset.autoplay === '1') play();
  };
}

// A canvas over an image, with a brush; onPaint(mask) gets a string of 0 and 1 after each stroke.
// Returns what paints the mask in data-mask.
function brush(element, onPaint) {
  let last = null;
  const canvas = () => element.querySelector('canvas');
  const stroke = event => {
    const box = canvas().getBoundingClientRect();
    const scale = canvas().width / box.width;
    const point = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    const pen = canvas().getContext('2d');
    pen.lineWidth = canvas().width / 6;
    pen.lineCap = 'round';
    pen.strokeStyle = COLOR;
    pen.beginPath();
    pen.moveTo(...(last || point));
    pen.lineTo(...point);
    pen.stroke();
    last = point;
  };
  const send = () => {
    const {width, height} = canvas();
    const {data} = canvas().getContext('2d').getImageData(0, 0, width, height);
    let mask = '';
    for (let i = 3; i < data.length; i += 4) mask += data[i] > 127 ? '1' : '0';
    onPaint(mask);
  };
  element.addEventListener('pointerdown', event => {
    if (event.target !== canvas()) return;
    canvas().setPointerCapture(event.pointerId);
    stroke(event);
  });
  element.addEventListener('pointermove', event => { if (last) stroke(event); });
  for (const end of ['pointerup', 'pointercancel']) {
    element.addEventListener(end, () => { if (last) { last = null; send(); } });
  }
  element.addEventListener('click', event => {
    if (!event.target.closest('button')) return;
    canvas().getContext('2d').clearRect(0, 0, canvas().width, canvas().height);
    send();
  });
  return () => {
    if (!canvas()) return;
    const pen = canvas().getContext('2d');
    pen.fillStyle = COLOR;
    [...canvas().dataset.mask].forEach((bit, i) => {
      if (bit === '1') pen.fillRect(i % canvas().width, Math.floor(i / canvas().width), 1, 1);
    });
  };
}
