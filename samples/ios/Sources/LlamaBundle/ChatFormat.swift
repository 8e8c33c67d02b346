/// One turn of a conversation.
public struct Message: Codable, Equatable, Sendable {
    public enum Role: String, Codable, Sendable {
        case system, user, assistant
    }

    public let role: Role
    public let content: String

    public init(_ role: Role, _ content: String) {
        self.role = role
        self.content = content
    }
}

/// What stands before, between and after the messages of a conversation: a chat template without Jinja.
public struct ChatFormat: Decodable, Sendable {
    let trims: Bool
    let user: [String]
    let systemUser: [String]?
    let assistant: [String]
    let nextUser: [String]
    let answer: String

    enum CodingKeys: String, CodingKey {
        case trims, user, assistant, answer
        case systemUser = "system_user"
        case nextUser = "next_user"
    }

    public init(from decoder: any Decoder) throws {
        let fields = try decoder.container(keyedBy: CodingKeys.self)
        func texts(_ key: CodingKeys, count: Int) throws -> [String] {
            let found = try fields.decode([String].self, forKey: key)
            guard found.count == count else {
                throw DecodingError.dataCorruptedError(
                    forKey: key, in: fields, debugDescription: "\(found.count) texts, \(count) were expected")
            }
            return found
        }
        trims = try fields.decode(Bool.self, forKey: .trims)
        user = try texts(.user, count: 2)
        systemUser = try fields.decodeNil(forKey: .systemUser) ? nil : texts(.systemUser, count: 3)
        assistant = try texts(.assistant, count: 2)
        nextUser = try texts(.nextUser, count: 2)
        answer = try fields.decode(String.self, forKey: .answer)
    }

    /// Whether a conversation may begin with a system message.
    public var takesSystemMessage: Bool { systemUser != nil }

    /// The text of a conversation, begin token included: encode it without adding one.
    ///
    /// A system message or none, then user and assistant in turn, the user last; throws `BundleError` otherwise.
    public func render(_ messages: [Message]) throws -> String {
        var turns = messages[...]
        var text = ""
        var first = user
        if let system = turns.first, system.role == .system {
            guard let systemUser else {
                throw BundleError("the chat template of this model takes no system message", hint: "leave it out")
            }
            text = systemUser[0] + content(of: system)
            first = Array(systemUser[1...])
            turns = turns.dropFirst()
        }
        let inTurn = turns.enumerated().allSatisfy { $1.role == ($0.isMultiple(of: 2) ? .user : .assistant) }
        guard inTurn, turns.last?.role == .user else {
            let found = messages.map(\.role.rawValue).joined(separator: ", ")
            throw BundleError(
                "the roles of the messages are \(found.isEmpty ? "none" : found)",
                hint: "give a system message or none, then user and assistant in turn, the user last")
        }
        for (index, message) in turns.enumerated() {
            let around = index == 0 ? first : message.role == .assistant ? assistant : nextUser
            text += around[0] + content(of: message) + around[1]
        }
        return text + answer
    }

    private func content(of message: Message) -> String {
        guard trims else { return message.content }
        let scalars = message.content.unicodeScalars
        guard let start = scalars.firstIndex(where: { !isSpace($0) }),
            let end = scalars.lastIndex(where: { !isSpace($0) })
        else { return "" }
        return String(scalars[start...end])
    }

    /// White space as Python's strip, and with it a template's trim, understands it.
    private func isSpace(_ scalar: Unicode.Scalar) -> Bool {
        scalar.properties.isWhitespace || (0x1C...0x1F).contains(scalar.value)
    }
}

/// Whether two texts are the same bytes: Swift's == takes a letter with its accent apart for the letter with it.
func sameBytes(_ a: String, _ b: String) -> Bool { a.utf8.elementsEqual(b.utf8) }
