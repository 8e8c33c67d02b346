import Foundation

/// How far logits are from the reference's, as `docs/bundle.md` defines each figure.
public struct Parity: Codable, Equatable, Sendable {
    public var positions: Int
    public var meanKL: Double
    /// At any one position.
    public var worstKL: Double
    public var top1Agreement: Double
    public var decidedTop1Agreement: Double
    public var decidedPositions: Int
    public var maxAbsLogitDifference: Double

    enum CodingKeys: String, CodingKey {
        case positions
        case meanKL = "mean_kl_nats"
        case worstKL = "worst_kl_nats"
        case top1Agreement = "top1_agreement"
        case decidedTop1Agreement = "decided_top1_agreement"
        case decidedPositions = "decided_positions"
        case maxAbsLogitDifference = "max_abs_logit_diff"
    }
}

/// The reference's logits at each golden position: the most likely ones, the rest told by their sum.
public struct GoldenLogits: Sendable {
    /// How many tokens of each row are kept.
    let kept: Int
    /// `[m, kept]`, best first.
    let topIDs: [Int]
    let topLogits: [Float]
    /// `[m]`, over the whole vocabulary.
    let logSumExp: [Float]

    public var rows: Int { logSumExp.count }

    /// What one row of an artifact's logits `[V]` adds to the figures. Throws `BundleError` for logits that are none.
    func compare(_ logits: [Float], row: Int) throws -> RowFigures {
        guard let highest = logits.max(), logits.allSatisfy(\.isFinite) else {
            throw BundleError(
                "the artifact's logits of golden row \(row) are not all finite numbers",
                hint: "try another compute unit or runtime version, and export again if it stays so")
        }
        let ids = topIDs[row * kept..<(row + 1) * kept]
        let golden = topLogits[row * kept..<(row + 1) * kept]
        guard let largest = ids.max(), largest < logits.count else {
            throw BundleError(
                "the artifact gives \(logits.count) logits, golden row \(row) needs more",
                hint: "check that the runner gives the logits of the last token, all of the vocabulary")
        }
        let top = Double(highest)
        let logSum = top + log(logits.reduce(into: 0.0) { $0 += exp(Double($1) - top) })
        var (kl, keptP, keptQ, furthest) = (0.0, 0.0, 0.0, 0.0)
        for (id, reference) in zip(ids, golden) {
            let logP = Double(reference) - Double(logSumExp[row])
            let logQ = Double(logits[id]) - logSum
            kl += exp(logP) * (logP - logQ)
            keptP += exp(logP)
            keptQ += exp(logQ)
            furthest = max(furthest, abs(Double(logits[id]) - Double(reference)))
        }
        let (restP, restQ) = (max(1 - keptP, 1e-12), max(1 - keptQ, 1e-12))
        kl += restP * (log(restP) - log(restQ))
        return RowFigures(
            kl: max(kl, 0),
            agrees: Sampler.best(of: logits) == ids[ids.startIndex],
            decided: isDecided(golden[golden.startIndex], golden[golden.startIndex + 1]),
            furthest: furthest)
    }

    /// Whether the best logit is further above the second than two fp16 spacings, which fp16 cannot confuse.
    private func isDecided(_ best: Float, _ second: Float) -> Bool {
        let magnitude = max(abs(best), 0x1p-14)
        let spacing = Float(sign: .plus, exponent: magnitude.exponent - 10, significand: 1)
        return best - second > 2 * spacing
    }
}

struct RowFigures {
    let kl: Double
    let agrees: Bool
    let decided: Bool
    let furthest: Double
}

extension Parity {
    /// Over all rows; there is at least one.
    init(_ rows: [RowFigures]) {
        let decided = rows.filter(\.decided)
        self.init(
            positions: rows.count,
            meanKL: rows.reduce(0) { $0 + $1.kl } / Double(rows.count),
            worstKL: rows.map(\.kl).max() ?? 0,
            top1Agreement: Double(rows.count(where: \.agrees)) / Double(rows.count),
            decidedTop1Agreement: decided.isEmpty ? 1 : Double(decided.count(where: \.agrees)) / Double(decided.count),
            decidedPositions: decided.count,
            maxAbsLogitDifference: rows.map(\.furthest).max() ?? 0)
    }
}

extension Array {
    fileprivate func count(where fits: (Element) -> Bool) -> Int { reduce(0) { $0 + (fits($1) ? 1 : 0) } }
}
