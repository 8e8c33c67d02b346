package llamabundle

private val goldens by lazy { sampleBundle.goldens() }
private val format by lazy { checkNotNull(sampleBundle.chatFormat()) { "the bundle has no chat_format.json" } }

private fun user(text: String) = Message(Role.USER, text)

private fun toy(trims: Boolean, systemUser: List<String>?) = ChatFormat(
    trims, listOf("<u>", "</u>"), systemUser, listOf("<a>", "</a>"), listOf("<n>", "</n>"), "!",
)

fun Suite.chatFormatTests() {
    test("every golden conversation gives its golden text") {
        check(goldens.chats.size >= 4)
        for (chat in goldens.chats) expect(format.render(chat.messages), chat.text)
    }
    test("a conversation is put together as the contract says") {
        val turns = listOf(user("one"), Message(Role.ASSISTANT, "two"), user(" three "))
        expect(toy(false, null).render(turns), "<u>one</u><a>two</a><n> three </n>!")
        val system = listOf(Message(Role.SYSTEM, "zero\u0085"), user("one"))
        expect(toy(true, listOf("<s>", "|", "</s>")).render(system), "<s>zero|one</s>!")
    }
    test("a system message is refused where none is taken") {
        expectRefused("no system message", "leave it out") {
            toy(true, null).render(listOf(Message(Role.SYSTEM, "x"), user("y")))
        }
    }
    test("roles out of turn are named") {
        expectRefused("user, user", "in turn") { format.render(listOf(user("a"), user("b"))) }
        expectRefused("none") { format.render(emptyList()) }
        expectRefused("user, assistant") { format.render(listOf(user("a"), Message(Role.ASSISTANT, "b"))) }
        expectRefused("system") { format.render(listOf(Message(Role.SYSTEM, "a"))) }
    }
}
