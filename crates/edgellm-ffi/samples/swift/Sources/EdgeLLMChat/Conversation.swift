import EdgeLLM
import Foundation

/// The conversation and the engine behind it. The engine works on a queue of its own, where it calls the listeners.
@MainActor
public final class Conversation: ObservableObject {
    @Published var messages: [Message] = []
    @Published var status = "loading the model"
    @Published var busy = true
    private var engine: Engine?
    private let queue = DispatchQueue(label: "org.edgellm.engine")
    private let adapter = FileManager.default.urls(for: .documentDirectory, in: .userDomainMask)[0].appending(path: "adapter")

    /// Loads a model folder, such as one that is in the app's bundle.
    public init(model: URL) {
        let adapter = adapter
        work { _ in
            let engine = try Engine.load(path: model.path, options: LoadOptions(memoryBudgetBytes: 1_500_000_000))
            if FileManager.default.fileExists(atPath: adapter.path) { try engine.loadAdapter(path: adapter.path) }
            let info = engine.info()
            return (engine, "\(info.name): \(info.bytes / 1_000_000) MB, \(info.kernels)")
        }
    }

    func send(_ text: String) {
        messages.append(Message(role: "user", content: text))
        let asked = messages
        messages.append(Message(role: "assistant", content: ""))
        let at = messages.count - 1
        let listener = Tokens { [weak self] answer in self?.messages[at] = Message(role: "assistant", content: answer) }
        work { engine in
            let result = try engine!.chat(messages: asked, options: GenerateOptions(), listener: listener)
            return (engine, String(format: "%.1f tokens/s", Double(result.tokens) / result.seconds))
        }
    }

    /// Learns an adapter from the conversation; it is in use from then on, and loaded at the next start.
    func learn() {
        let (asked, adapter) = (messages, adapter)
        let listener = Steps { [weak self] text in self?.status = text }
        work { engine in
            _ = try engine!.adapt(examples: [.chat(messages: asked)], options: AdaptOptions(batch: 1), listener: listener)
            try engine!.saveAdapter(path: adapter.path)
            return (engine, "learned")
        }
    }

    func stop() {
        engine?.cancel()
    }

    /// Runs on the engine's queue; shows what it returns, or why it failed.
    private func work(_ run: @escaping @Sendable (Engine?) throws -> (Engine?, String)) {
        busy = true
        let engine = engine
        queue.async {
            let result = Result { try run(engine) }
            Task { @MainActor in
                switch result {
                case .success(let (engine, text)): (self.engine, self.status) = (engine, text)
                case .failure(let error): self.status = "\(error)"
                }
                self.busy = false
            }
        }
    }
}

/// Gathers an answer and shows it as it grows. Called on the engine's queue only.
private final class Tokens: TokenListener, @unchecked Sendable {
    private var answer = ""
    private let show: @MainActor (String) -> Void

    init(show: @escaping @MainActor (String) -> Void) { self.show = show }

    func onToken(text: String) throws -> Bool {
        answer += text
        let (shown, show) = (answer, show)
        Task { @MainActor in show(shown) }
        return true
    }
}

/// Shows the progress of learning.
private final class Steps: ProgressListener, @unchecked Sendable {
    private let show: @MainActor (String) -> Void

    init(show: @escaping @MainActor (String) -> Void) { self.show = show }

    func onStep(step: UInt32, total: UInt32, loss: Double, bytes: UInt64) throws -> Step {
        let (text, show) = (String(format: "learning: step %u of %u, loss %.2f", step, total, loss), show)
        Task { @MainActor in show(text) }
        return .continue
    }
}
