package org.edgellm.sample

import android.os.Bundle
import androidx.activity.ComponentActivity
import androidx.activity.compose.setContent
import androidx.compose.foundation.layout.*
import androidx.compose.foundation.lazy.LazyColumn
import androidx.compose.foundation.lazy.items
import androidx.compose.material3.*
import androidx.compose.runtime.*
import androidx.compose.ui.Modifier
import androidx.compose.ui.unit.dp

class MainActivity : ComponentActivity() {
    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        val conversation = Conversation(applicationContext)
        setContent { MaterialTheme { Chat(conversation) } }
    }
}

@Composable
fun Chat(conversation: Conversation) {
    var text by remember { mutableStateOf("") }
    Column(Modifier.fillMaxSize().safeDrawingPadding().padding(12.dp)) {
        Text(conversation.status, style = MaterialTheme.typography.labelMedium)
        LazyColumn(Modifier.weight(1f)) {
            items(conversation.messages) { message -> Text("${message.role}: ${message.content}", Modifier.padding(vertical = 6.dp)) }
        }
        OutlinedTextField(text, { text = it }, Modifier.fillMaxWidth(), placeholder = { Text("Message") })
        Row(horizontalArrangement = Arrangement.spacedBy(8.dp)) {
            Button({ conversation.send(text); text = "" }, enabled = !conversation.busy && text.isNotBlank()) { Text("Send") }
            Button({ conversation.stop() }, enabled = conversation.busy) { Text("Stop") }
            Button({ conversation.learn() }, enabled = !conversation.busy && conversation.messages.size > 1) {
                Text("Learn from this conversation")
            }
        }
    }
}
