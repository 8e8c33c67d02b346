import Foundation
import LlamaBundle
import Observation

/// What the views show. All work on the model is done by `Assistant`, off the main actor.
@MainActor
@Observable
final class AppModel {
    enum State {
        case working(String)
        case failed(String)
        case ready
    }

    private(set) var state = State.working("Opening the bundle")
    private(set) var report: DeviceReport?
    private(set) var faults: [String] = []
    private(set) var messages: [Message] = []
    private(set) var isAnswering = false
    private(set) var problem: String?
    private var assistant: Assistant?
    private var answer: Task<Void, Never>?

    /// `device-report.json`, to be shared once it is written.
    let reportURL: URL
    private let folder: URL?
    private let scratch: URL

    /// `folder` holds the bundle; reports and compiled models go into `scratch`.
    init(folder: URL?, scratch: URL) {
        self.folder = folder
        self.scratch = scratch
        reportURL = scratch.appendingPathComponent("device-report.json")
    }

    /// Opens and loads the bundle; at its first start also checks every byte and runs the self-test.
    func start() async {
        guard let folder else {
            state = .failed("The app holds no bundle: see README.md for where it has to lie.")
            return
        }
        do {
            let (assistant, known) = try await load(folder)
            self.assistant = assistant
            if let known { show(known, of: assistant.bundle.manifest) } else { try await test() }
            state = .ready
        } catch {
            state = .failed("\(error)")
        }
    }

    func testAgain() async {
        do {
            try await test()
            state = .ready
        } catch {
            state = .failed("\(error)")
        }
    }

    func send(_ text: String) {
        guard let assistant, !isAnswering else { return }
        messages.append(Message(.user, text))
        isAnswering = true
        problem = nil
        let question = messages
        answer = Task {
            do {
                var written = ""
                for try await piece in assistant.answer(to: question) {
                    written += piece
                    messages = question + [Message(.assistant, written)]
                }
                messages = question + [Message(.assistant, written)]
            } catch {
                problem = "\(error)"
                messages = question.dropLast()
            }
            isAnswering = false
        }
    }

    func stop() { answer?.cancel() }

    func forget() {
        guard !isAnswering else { return }
        messages = []
    }

    private func test() async throws {
        guard let assistant else { return }
        state = .working("Testing")
        let device = DeviceReport.Device.current(runtime: runtimeName(of: assistant.bundle), app: "LlamaBundle sample")
        let report = try await assistant.test(device: device) { step in
            Task { @MainActor in self.tell(step) }
        }
        try report.write(to: reportURL)
        show(report, of: assistant.bundle.manifest)
    }

    private func tell(_ step: String) {
        if case .working = state { state = .working("Testing: \(step)") }
    }

    private func show(_ report: DeviceReport, of manifest: Manifest) {
        self.report = report
        faults = report.faults(for: manifest)
    }

    /// The bundle, loaded, and its report where an earlier start has written one.
    private nonisolated func load(_ folder: URL) async throws -> (Assistant, DeviceReport?) {
        try FileManager.default.createDirectory(at: scratch, withIntermediateDirectories: true)
        var bundle = try ModelBundle(folder: folder, check: .sizes)
        let written = try? JSONDecoder().decode(DeviceReport.self, from: Data(contentsOf: reportURL))
        let known = written?.manifestSHA256 == bundle.manifestSHA256 ? written : nil
        if known == nil { bundle = try ModelBundle(folder: folder, check: .checksums) }
        let scratch = scratch
        let assistant = try await Assistant(
            bundle: bundle,
            tokenizer: try ByteLevelTokenizer(bundle: bundle),
            seed: UInt64.random(in: .min ... .max)
        ) { try await loadRunner(for: $0, scratch: scratch) }
        return (assistant, known)
    }
}
