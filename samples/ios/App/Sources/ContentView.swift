import LlamaBundle
import SwiftUI

struct ContentView: View {
    let model: AppModel

    var body: some View {
        switch model.state {
        case .working(let step):
            ProgressView(step)
        case .failed(let reason):
            ContentUnavailableView("The model cannot be used", systemImage: "xmark.octagon", description: Text(reason))
        case .ready:
            TabView {
                ChatView(model: model).tabItem { Label("Chat", systemImage: "bubble.left.and.bubble.right") }
                ReportView(model: model).tabItem { Label("Self-test", systemImage: "checkmark.seal") }
            }
        }
    }
}

struct ChatView: View {
    let model: AppModel
    @State private var text = ""

    var body: some View {
        NavigationStack {
            ScrollView {
                LazyVStack(alignment: .leading, spacing: 12) {
                    ForEach(Array(model.messages.enumerated()), id: \.offset) { _, message in
                        let mine = message.role == .user
                        Text(message.content)
                            .padding(10)
                            .background(mine ? Color.accentColor.opacity(0.2) : Color.gray.opacity(0.15))
                            .clipShape(RoundedRectangle(cornerRadius: 12))
                            .frame(maxWidth: .infinity, alignment: mine ? .trailing : .leading)
                            .textSelection(.enabled)
                    }
                    if let problem = model.problem { Text(problem).foregroundStyle(.red) }
                }
                .padding()
            }
            .defaultScrollAnchor(.bottom)
            .safeAreaInset(edge: .bottom) { input }
            .navigationTitle("Chat")
            .navigationBarTitleDisplayMode(.inline)
            .toolbar { Button("New", systemImage: "square.and.pencil") { model.forget() }.disabled(model.isAnswering) }
        }
    }

    private var input: some View {
        HStack {
            TextField("Message", text: $text, axis: .vertical).textFieldStyle(.roundedBorder).onSubmit(send)
            if model.isAnswering {
                Button("Stop", systemImage: "stop.circle.fill") { model.stop() }.labelStyle(.iconOnly)
            } else {
                Button("Send", systemImage: "arrow.up.circle.fill", action: send).labelStyle(.iconOnly)
                    .disabled(text.isEmpty)
            }
        }
        .padding()
        .background(.bar)
    }

    private func send() {
        guard !text.isEmpty else { return }
        model.send(text)
        text = ""
    }
}

struct ReportView: View {
    let model: AppModel

    var body: some View {
        NavigationStack {
            List {
                Section {
                    if model.faults.isEmpty {
                        Label("The artifact answers as its model does", systemImage: "checkmark.circle.fill")
                            .foregroundStyle(.green)
                    }
                    ForEach(model.faults, id: \.self) { fault in
                        Label(fault, systemImage: "exclamationmark.triangle.fill").foregroundStyle(.red)
                    }
                }
                if let report = model.report {
                    Section("Parity over \(report.parity.positions) positions") {
                        LabeledContent(
                            "Mean KL, nats", value: report.parity.meanKL, format: .number.notation(.scientific))
                        LabeledContent("Top-1 agreement", value: report.parity.top1Agreement, format: .percent)
                        LabeledContent("where decided", value: report.parity.decidedTop1Agreement, format: .percent)
                        agreement("Greedy tokens", report.greedy)
                        agreement("Chats", report.chats)
                    }
                    Section("Latency, medians of \(report.latency.runs)") {
                        figure("Load, s", report.latency.loadSeconds)
                        figure("First token, ms", report.latency.timeToFirstTokenMilliseconds)
                        figure("Prefill, tokens/s", report.latency.prefillTokensPerSecond)
                        figure("Decode, tokens/s", report.latency.decodeTokensPerSecond)
                        figure("Peak memory, MB", report.peakMemoryBytes.map { Double($0) / 1e6 })
                    }
                }
            }
            .navigationTitle("Self-test")
            .toolbar {
                ShareLink(item: model.reportURL)
                Button("Test again", systemImage: "arrow.clockwise") { Task { await model.testAgain() } }
                    .disabled(model.isAnswering)
            }
        }
    }

    private func figure(_ name: String, _ value: Double?) -> some View {
        let text = value.map { $0.formatted(.number.precision(.significantDigits(3))) }
        return LabeledContent(name, value: text ?? "not measured")
    }

    private func agreement(_ name: String, _ agreement: Agreement) -> some View {
        LabeledContent(name, value: agreement.compared.map { "\(agreement.agreeing ?? 0) of \($0)" } ?? "not measured")
    }
}
