/// One loaded artifact with one key-value cache.
public protocol Runner {
    /// Forget every token from `position` on; 0: start anew. Never beyond what the cache holds.
    mutating func rewind(to position: Int) throws

    /// Append tokens to the cache, at least one; the logits `[V]` after the last of them.
    mutating func feed(_ ids: [Int]) throws -> [Float]
}

/// Text to tokens and back.
public protocol Tokenizer: Sendable {
    /// Special tokens in the text are taken as such; none is added.
    func encode(_ text: String) throws -> [Int]

    /// The bytes that a token stands for, which need not be whole characters; none for a special token.
    func bytes(of id: Int) -> [UInt8]
}

/// The mask `[1, 1, end - position, end]` of a Core ML artifact as bits of float16, row after row: 0 up to and
/// including a query's own position, -inf beyond it.
public func causalMask(position: Int, end: Int) -> [UInt16] {
    let minusInfinity: UInt16 = 0xFC00
    var mask = [UInt16](repeating: 0, count: (end - position) * end)
    for row in 0..<(end - position) {
        for column in (position + row + 1)..<max(end, position + row + 1) { mask[row * end + column] = minusInfinity }
    }
    return mask
}

/// Throws `BundleError` for tokens that do not fit the cache after `position`, or are none of the vocabulary.
public func checkFeed(_ ids: [Int], position: Int, manifest: Manifest) throws {
    guard !ids.isEmpty, position + ids.count <= manifest.context else {
        throw BundleError(
            "\(ids.count) tokens at position \(position) do not fit a context of \(manifest.context)",
            hint: "feed between 1 and the room that is left, rewind, or export with a larger --context")
    }
    if let strange = ids.first(where: { !(0..<manifest.model.vocabularySize).contains($0) }) {
        throw BundleError(
            "token \(strange) is outside the vocabulary of \(manifest.model.vocabularySize)",
            hint: "tokenize with the tokenizer of this bundle")
    }
}

/// Throws `BundleError` for a position that is not in the cache.
public func checkRewind(_ position: Int, current: Int) throws {
    guard (0...current).contains(position) else {
        throw BundleError(
            "cannot rewind to position \(position): the cache holds \(current) tokens",
            hint: "rewind to a position that has been fed")
    }
}
