package llamabundle

import java.io.File

enum class Role { SYSTEM, USER, ASSISTANT }

data class Message(val role: Role, val content: String)

/** A chat template told as the text around each message (`chat_format.json`). */
class ChatFormat(
    private val trims: Boolean,
    private val user: List<String>,
    private val systemUser: List<String>?,
    private val assistant: List<String>,
    private val nextUser: List<String>,
    private val answer: String,
) {
    val takesSystemMessage get() = systemUser != null

    /**
     * The text of a conversation, ready to be answered. It has the begin token in it: encode it without adding one.
     *
     * Throws [BundleException] unless it is a system message or none, then user and assistant in turn, the user last.
     */
    fun render(messages: List<Message>): String {
        val system = messages.firstOrNull()?.takeIf { it.role == Role.SYSTEM }
        val turns = if (system == null) messages else messages.drop(1)
        val inTurn = turns.withIndex().all { (index, turn) ->
            turn.role == if (index % 2 == 0) Role.USER else Role.ASSISTANT
        }
        if (turns.size % 2 == 0 || !inTurn) {
            val roles = messages.joinToString { it.role.name.lowercase() }.ifEmpty { "none" }
            throw BundleException(
                "the roles of the messages are $roles",
                "give a system message or none, then user and assistant in turn, the user last",
            )
        }
        return buildString {
            append(beginning(system, turns.first()))
            for (turn in turns.drop(1)) append(if (turn.role == Role.ASSISTANT) assistant else nextUser, turn)
            append(answer)
        }
    }

    private fun beginning(system: Message?, first: Message): String {
        if (system == null) return user[0] + text(first) + user[1]
        val around = systemUser
            ?: throw BundleException("the chat template of this model takes no system message", "leave it out")
        return around[0] + text(system) + around[1] + text(first) + around[2]
    }

    private fun StringBuilder.append(around: List<String>, turn: Message) {
        append(around[0]).append(text(turn)).append(around[1])
    }

    private fun text(message: Message) = if (trims) message.content.trim(::isSpace) else message.content

    companion object {
        fun read(file: File): ChatFormat {
            val json = Field.read(file)
            return ChatFormat(
                trims = json["trims"].boolean(),
                user = json["user"].strings(2),
                systemUser = json["system_user"].let { if (it.isNull) null else it.strings(3) },
                assistant = json["assistant"].strings(2),
                nextUser = json["next_user"].strings(2),
                answer = json["answer"].string(),
            )
        }

        /** White space as the template's own `trim` means it, which takes U+0085 for one where the JVM does not. */
        private fun isSpace(character: Char) = character.isWhitespace() || character == '\u0085'
    }
}
