import { expect, test } from "vitest";

import { divergence, fp16Spacing, judge, ParitySums, type DeviceReport } from "../src/selftest";

const log = (...shares: number[]) => Float32Array.from(shares, Math.log);

test("the divergence of a distribution from itself is nothing", () =>
  expect(divergence(Int32Array.of(2, 0), log(0.5, 0.3), 0, log(0.3, 0.2, 0.5))).toBeCloseTo(0, 7));

test("kept tokens count one by one, and all others as one bin", () => {
  // p = .5, .3 and .2 for the rest; q = .25, .25 and .5 for the rest.
  const expected = 0.5 * Math.log(2) + 0.3 * Math.log(0.3 / 0.25) + 0.2 * Math.log(0.2 / 0.5);
  expect(divergence(Int32Array.of(3, 1), log(0.5, 0.3), 0, log(0.3, 0.25, 0.2, 0.25))).toBeCloseTo(expected, 6);
});

test("a constant on all logits changes nothing", () => {
  const shifted = log(0.3, 0.2, 0.5).map((logit) => logit + 100);
  expect(divergence(Int32Array.of(2, 0), log(0.5, 0.3), 0, shifted)).toBeCloseTo(0, 5);
});

test("a rest of nothing is taken for 1e-12", () => {
  const all = divergence(Int32Array.of(0, 1), log(0.5, 0.5), 0, log(0.4, 0.4, 0.2));
  expect(all).toBeCloseTo(Math.log(0.5 / 0.4), 6);
});

test.each([
  [1, 2 ** -10],
  [-1.99, 2 ** -10],
  [10.5, 2 ** -7],
  [0, 2 ** -24],
])("neighbours of %f in fp16 are %f away", (x, spacing) => expect(fp16Spacing(x)).toBe(spacing));

test("agreement over all positions, and over those where the reference is decided", () => {
  const sums = new ParitySums({
    topIds: Int32Array.of(0, 1, 1, 0), // the first row is decided, the second is not
    topLogits: Float32Array.of(2, 1, 1.0005, 1),
    logsumexp: Float32Array.of(2.4, 1.7),
    k: 2,
  });
  sums.add(Float32Array.of(2, 1.25));
  sums.add(Float32Array.of(1, 0.5));
  expect(sums.figures()).toMatchObject({
    positions: 2,
    top1_agreement: 0.5,
    decided_top1_agreement: 1,
    decided_positions: 1,
    max_abs_logit_diff: expect.closeTo(0.5005, 5),
  });
});

test("positions that were left out are an error", () => {
  const kept = { topIds: Int32Array.of(0), topLogits: Float32Array.of(0), logsumexp: Float32Array.of(0), k: 1 };
  expect(() => new ParitySums(kept).figures()).toThrow("0 positions were computed, but the goldens have 1");
});

test.each([
  ["Mean KL", { parity: { mean_kl_nats: 2.1e-3 } }],
  ["Mean KL", { parity: { mean_kl_nats: NaN } }],
  ["KL at the worst position", { parity: { worst_kl_nats: 2.1e-2 } }],
  ["KL at the worst position", { parity: { worst_kl_nats: NaN } }],
  ["Same first choice where it is decided", { parity: { decided_top1_agreement: 0.99 } }],
  ["Largest logit difference", { parity: { max_abs_logit_diff: NaN } }],
  ["Greedy tokens", { greedy: { agreeing: 10 } }],
  ["Chats", { chats: { agreeing: 4 } }],
])("%s fails where %j", (name, changed: Record<string, object>) => {
  const good = {
    parity: {
      positions: 194,
      mean_kl_nats: 1.9e-3,
      worst_kl_nats: 1.9e-2,
      top1_agreement: 1,
      decided_top1_agreement: 1,
      decided_positions: 192,
      max_abs_logit_diff: 0.1,
    },
    greedy: { prompts: 3, compared: 11, agreeing: 11 },
    chats: { compared: 5, agreeing: 5 },
  };
  const failed = (report: object) =>
    judge(report as DeviceReport, {
      parity: { gate_mean_kl_nats: 2e-3, gate_worst_kl_nats: 2e-2, gate_decided_top1_agreement: 0.995 },
    })
      .filter((check) => !check.passed)
      .map((check) => check.name);
  expect(failed(good)).toEqual([]);
  const part = Object.keys(changed)[0] as keyof typeof good;
  expect(failed({ ...good, [part]: { ...good[part], ...changed[part] } })).toEqual([name]);
});
