package llamabundle

private val tokenizer by lazy { BytePairTokenizer.read(sampleBundle.file("tokenizer.json")) }

private fun Utf8Stream.all(parts: List<ByteArray>) = parts.map(::push) + finish()

fun Suite.textTests() {
    test("a character that is split over tokens comes whole, however it is split") {
        val bytes = "🙂".encodeToByteArray()
        expect(bytes.size, 4)
        for (cut in 1..3) {
            val parts = listOf(bytes.copyOfRange(0, cut), bytes.copyOfRange(cut, 4))
            expect(Utf8Stream().all(parts), listOf("", "🙂", ""))
        }
    }
    test("byte by byte, nothing is lost and nothing comes half") {
        val text = "naïve, 東京 🙂👍🏽!"
        val pieces = Utf8Stream().all(text.encodeToByteArray().map { byteArrayOf(it) })
        expect(pieces.joinToString(""), text)
        check(pieces.none { it.endsWith('\uFFFD') || it.lastOrNull()?.isHighSurrogate() == true })
    }
    test("bytes that are no text become the replacement character, and the text goes on") {
        expect(Utf8Stream().all(listOf(byteArrayOf(-1), "a".encodeToByteArray())), listOf("\uFFFD", "a", ""))
        expect(Utf8Stream().all(listOf("🙂".encodeToByteArray().copyOf(3))), listOf("", "\uFFFD"))
        val stream = Utf8Stream()
        expect(stream.push("🙂".encodeToByteArray().copyOf(2)) + stream.push("b".encodeToByteArray()), "\uFFFDb")
    }
    test("the tokenizer gives the tokens of the golden prompts and chats") {
        val goldens = sampleBundle.goldens()
        for (chat in goldens.chats) expect(tokenizer.encode(chat.text).toList(), chat.ids.toList())
        val bos = listOfNotNull(sampleBundle.manifest.model.bosTokenId)
        val format = checkNotNull(sampleBundle.chatFormat())
        for (prompt in goldens.prompts) { // a text to go on with, or what a user says
            val plain = bos + tokenizer.encode(prompt.text).toList()
            val chat = tokenizer.encode(format.render(listOf(Message(Role.USER, prompt.text)))).toList()
            check(prompt.ids.toList() in listOf(plain, chat)) { "<${prompt.text}> is $plain or $chat" }
        }
    }
    test("the tokens of the golden answers give their text") {
        for (prompt in sampleBundle.goldens().prompts) {
            expect(Utf8Stream().all(prompt.greedyIds.map(tokenizer::bytes)).joinToString(""), prompt.greedyText)
        }
    }
    test("any text comes back from its tokens") {
        val odd = "\u0000\t \u00A0\u2003x\u0085\r\n\n  Ǆé 東京🙂 1234567 it's IT'S \uFFFD"
        expect(Utf8Stream().all(tokenizer.encode(odd).map(tokenizer::bytes)).joinToString(""), odd)
        expect(tokenizer.encode("").size, 0)
    }
    test("a long part takes no time that grows with its square") {
        val started = System.nanoTime()
        expect(tokenizer.encode("ab".repeat(100_000)).isNotEmpty(), true)
        check(System.nanoTime() - started < 20_000_000_000)
    }
    test("special tokens are taken whole, are no text, and unknown ones are refused") {
        val bos = checkNotNull(sampleBundle.manifest.model.bosTokenId)
        expect(tokenizer.bytes(bos).size, 0)
        expectRefused("token 999999999 is none") { tokenizer.bytes(999_999_999) }
    }
}
