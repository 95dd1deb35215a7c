import SwiftUI

/// A chat that learns.
public struct ChatView: View {
    @StateObject private var conversation: Conversation
    @State private var text = ""

    /// A chat with the model in this folder.
    public init(model: URL) {
        _conversation = StateObject(wrappedValue: Conversation(model: model))
    }

    public var body: some View {
        VStack(alignment: .leading) {
            Text(conversation.status).font(.caption)
            List(Array(conversation.messages.enumerated()), id: \.offset) { _, message in
                Text("\(message.role): \(message.content)")
            }
            TextField("Message", text: $text).textFieldStyle(.roundedBorder)
            HStack {
                Button("Send") {
                    conversation.send(text)
                    text = ""
                }
                .disabled(conversation.busy || text.isEmpty)
                Button("Stop") { conversation.stop() }.disabled(!conversation.busy)
                Button("Learn from this conversation") { conversation.learn() }
                    .disabled(conversation.busy || conversation.messages.count < 2)
            }
        }
        .padding()
    }
}
