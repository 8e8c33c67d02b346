import Foundation

/// What the model answers, to test the artifact with nothing else at hand.
public struct Goldens: Sendable {
    /// A prompt and the reference's greedy continuation.
    public struct Prompt: Decodable, Sendable {
        public let text: String
        public let ids: [Int]
        public let greedyIDs: [Int]
        public let greedyText: String
        /// By how many logits each token was ahead of the second best.
        public let greedyMargins: [Double]

        enum CodingKeys: String, CodingKey {
            case text, ids
            case greedyIDs = "greedy_ids"
            case greedyText = "greedy_text"
            case greedyMargins = "greedy_margins"
        }
    }

    /// A conversation, and what the chat format and the tokenizer have to give for it.
    public struct Chat: Decodable, Sendable {
        public let messages: [Message]
        public let text: String
        public let ids: [Int]
    }

    private struct Content: Decodable {
        let prefills: [Int]
        let prompts: [Prompt]
        let chats: [Chat]?
    }

    public let prompts: [Prompt]
    public let chats: [Chat]
    /// The tokens to feed.
    public let ids: [Int]
    /// Lengths of the two prefills that the tokens begin with.
    public let prefills: (first: Int, second: Int)
    public let logits: GoldenLogits

    init(bundle: ModelBundle) throws {
        let url = bundle.url("goldens.json")
        let content = try decode(Content.self, from: url)
        let tensors = try Safetensors(contentsOf: bundle.url("goldens.safetensors"))
        let shape = try tensors.shape("top_ids")
        prompts = content.prompts
        chats = content.chats ?? []
        ids = try tensors.integers("ids")
        prefills = (content.prefills.first ?? 0, content.prefills.last ?? 0)
        logits = GoldenLogits(
            kept: shape.last ?? 0,
            topIDs: try tensors.integers("top_ids"),
            topLogits: try tensors.floats("top_logits"),
            logSumExp: try tensors.floats("logsumexp"))

        let (a, b) = prefills
        let rows = 2 + ids.count - a - b
        let margins = prompts.allSatisfy { $0.greedyIDs.count == $0.greedyMargins.count && !$0.ids.isEmpty }
        let known = 0..<bundle.manifest.model.vocabularySize
        guard content.prefills.count == 2, a > 0, b > 0, rows >= 2, margins, shape == [rows, logits.kept],
            logits.kept >= 2, logits.logSumExp.count == rows, tensors.shapeIs("top_logits", shape),
            logits.topIDs.allSatisfy(known.contains)
        else {
            throw BundleError(
                "\(url.path) and goldens.safetensors do not fit together: prefills \(content.prefills), "
                    + "\(ids.count) tokens, top_ids \(shape), logsumexp of \(logits.logSumExp.count)",
                hint: copyAgain)
        }
    }
}

extension Safetensors {
    func shapeIs(_ name: String, _ wanted: [Int]) -> Bool { (try? shape(name)) == wanted }
}
