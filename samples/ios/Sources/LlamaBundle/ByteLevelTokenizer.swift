import Foundation

/// Byte-level BPE as `tokenizer.json` of Llama 3 describes it. Others, like Llama 2's, are refused: take a tokenizer
/// library for them, behind `Tokenizer`.
public struct ByteLevelTokenizer: Tokenizer {
    private struct Pair: Hashable, Sendable {
        let left: Int
        let right: Int
    }

    private struct Merge: Sendable {
        let rank: Int
        let result: Int
    }

    private let vocabulary: [String: Int]
    private let merges: [Pair: Merge]
    private let takesWholeWords: Bool
    private let special: [String: Int]
    private let texts: [Int: [UInt8]]
    private let splits: [NSRegularExpression]
    private let specialTexts: NSRegularExpression?

    public init(bundle: ModelBundle) throws { try self.init(contentsOf: bundle.url("tokenizer.json")) }

    /// Throws `BundleError` for a tokenizer of another kind.
    public init(contentsOf url: URL) throws {
        guard let root = try JSONSerialization.jsonObject(with: try read(url)) as? [String: Any],
            let model = root["model"] as? [String: Any], let vocabulary = model["vocab"] as? [String: Int]
        else { throw ByteLevelTokenizer.refused(url, "it has no model with a vocabulary") }
        splits = try ByteLevelTokenizer.splits(root, model, url: url)
        takesWholeWords = model["ignore_merges"] as? Bool ?? false
        self.vocabulary = vocabulary
        merges = try ByteLevelTokenizer.merges(model["merges"], vocabulary, url: url)

        let added = root["added_tokens"] as? [[String: Any]] ?? []
        var special: [String: Int] = [:]
        for token in added {
            guard let content = token["content"] as? String, let id = token["id"] as? Int,
                !["lstrip", "rstrip", "single_word"].contains(where: { token[$0] as? Bool == true })
            else { throw ByteLevelTokenizer.refused(url, "an added token takes the space around it") }
            special[content] = id
        }
        self.special = special
        specialTexts = try ByteLevelTokenizer.alternatives(special.keys)

        let bytes = Dictionary(uniqueKeysWithValues: zip(ByteLevelTokenizer.letters, UInt8.min...UInt8.max))
        var texts: [Int: [UInt8]] = [:]
        for (text, id) in vocabulary { texts[id] = text.unicodeScalars.compactMap { bytes[$0] } }
        for token in added where token["special"] as? Bool != true {
            guard let content = token["content"] as? String, let id = token["id"] as? Int else { continue }
            texts[id] = Array(content.utf8)
        }
        self.texts = texts
    }

    public func bytes(of id: Int) -> [UInt8] { texts[id] ?? [] }

    public func encode(_ text: String) throws -> [Int] {
        try pieces(of: text, at: specialTexts).flatMap { part, matched in
            if matched, let id = special[part] { return [id] }
            let words = splits.reduce([part]) { words, split in
                words.flatMap { pieces(of: $0, at: split).map(\.text) }
            }
            return try words.flatMap(encodeWord)
        }
    }

    private func encodeWord(_ word: String) throws -> [Int] {
        let letters = word.utf8.map { ByteLevelTokenizer.letters[Int($0)] }
        if takesWholeWords, let id = vocabulary[ByteLevelTokenizer.text(letters)] { return [id] }
        var ids = try letters.map { letter in
            guard let id = vocabulary[String(letter)] else {
                throw BundleError("the vocabulary has no token for the byte '\(letter)'", hint: copyAgain)
            }
            return id
        }
        while let (index, merge) = nextMerge(ids) { ids.replaceSubrange(index...(index + 1), with: [merge]) }
        return ids
    }

    /// Where the merge of the lowest rank is to be done, the first of several, and the token that it gives.
    private func nextMerge(_ ids: [Int]) -> (index: Int, result: Int)? {
        var best: (index: Int, merge: Merge)?
        for index in ids.indices.dropLast() {
            guard let merge = merges[Pair(left: ids[index], right: ids[index + 1])] else { continue }
            if merge.rank < best?.merge.rank ?? .max { best = (index, merge) }
        }
        return best.map { ($0.index, $0.merge.result) }
    }

    /// A text cut into what `pattern` matches and what is between.
    private func pieces(of text: String, at pattern: NSRegularExpression?) -> [(text: String, matched: Bool)] {
        guard let pattern, !text.isEmpty else { return text.isEmpty ? [] : [(text, false)] }
        let whole = text as NSString
        var pieces: [(String, Bool)] = []
        var end = 0
        for match in pattern.matches(in: text, range: NSRange(location: 0, length: whole.length)) {
            let range = match.range
            if range.location > end {
                pieces.append((whole.substring(with: NSRange(location: end, length: range.location - end)), false))
            }
            if range.length > 0 { pieces.append((whole.substring(with: range), true)) }
            end = range.location + range.length
        }
        if end < whole.length { pieces.append((whole.substring(from: end), false)) }
        return pieces
    }

    private static func splits(
        _ root: [String: Any], _ model: [String: Any], url: URL
    ) throws -> [NSRegularExpression] {
        let before = root["pre_tokenizer"] as? [String: Any]
        let steps = before?["pretokenizers"] as? [[String: Any]] ?? []
        guard model["type"] as? String == "BPE", model["byte_fallback"] as? Bool != true,
            !(root["normalizer"] is [String: Any]), let last = steps.last, last["type"] as? String == "ByteLevel",
            last["add_prefix_space"] as? Bool != true, last["use_regex"] as? Bool == false
        else { throw refused(url, "its model is no byte-level BPE that is split by patterns alone") }
        return try steps.dropLast().map { step in
            guard step["type"] as? String == "Split", step["behavior"] as? String == "Isolated",
                step["invert"] as? Bool != true, let regex = (step["pattern"] as? [String: Any])?["Regex"] as? String
            else { throw refused(url, "a step before the model is no pattern that isolates") }
            // \s of the tokenizers library is all white space of Unicode; that of Foundation lacks two characters.
            let pattern = regex.replacingOccurrences(of: "\\s", with: "\\p{White_Space}")
                .replacingOccurrences(of: "\\S", with: "\\P{White_Space}")
            return try NSRegularExpression(pattern: pattern)
        }
    }

    private static func merges(_ written: Any?, _ vocabulary: [String: Int], url: URL) throws -> [Pair: Merge] {
        var merges: [Pair: Merge] = [:]
        for (rank, entry) in (written as? [Any] ?? []).enumerated() {
            let sides = entry as? [String] ?? (entry as? String)?.components(separatedBy: " ") ?? []
            guard sides.count == 2, let left = vocabulary[sides[0]], let right = vocabulary[sides[1]],
                let result = vocabulary[sides[0] + sides[1]]
            else { throw refused(url, "merge \(rank) is of tokens that it does not have") }
            merges[Pair(left: left, right: right)] = Merge(rank: rank, result: result)
        }
        return merges
    }

    /// Matches any of the texts, the longest where several begin at one place; nil for none.
    private static func alternatives(_ texts: some Collection<String>) throws -> NSRegularExpression? {
        guard !texts.isEmpty else { return nil }
        let longestFirst = texts.sorted { ($1.utf16.count, $0) < ($0.utf16.count, $1) }
        let pattern = longestFirst.map(NSRegularExpression.escapedPattern).joined(separator: "|")
        return try NSRegularExpression(pattern: pattern)
    }

    private static func refused(_ url: URL, _ why: String) -> BundleError {
        BundleError(
            "\(url.path) is of a kind that this app does not know: \(why)",
            hint: "take a tokenizer library for this model, such as swift-transformers, behind the Tokenizer protocol")
    }

    private static func text(_ letters: [Unicode.Scalar]) -> String {
        var text = String.UnicodeScalarView()
        text.append(contentsOf: letters)
        return String(text)
    }

    /// By byte, the letter that stands for it: itself where it can be seen, else the next one from U+0100 on.
    private static let letters: [Unicode.Scalar] = {
        var invisible: UInt32 = 0x100
        return (UInt32(0)...255).map { byte in
            if (0x21...0x7E).contains(byte) || (0xA1...0xAC).contains(byte) || (0xAE...0xFF).contains(byte) {
                return Unicode.Scalar(byte)!
            }
            defer { invisible += 1 }
            return Unicode.Scalar(invisible)!
        }
    }()
}
