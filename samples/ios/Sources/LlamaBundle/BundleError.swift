import Foundation

/// What went wrong, in one sentence with the value found and the value wanted; and what to do about it.
public struct BundleError: LocalizedError, CustomStringConvertible, Equatable, Sendable {
    public let message: String
    public let hint: String

    public init(_ message: String, hint: String) {
        self.message = message
        self.hint = hint
    }

    public var description: String { "\(message). To go on: \(hint)." }
    public var errorDescription: String? { description }
}

let copyAgain = "export the bundle again, or copy it again from where it was whole"
