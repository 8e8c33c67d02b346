package llamabundle

/** Whatever is wrong with a bundle, or with what is asked of it: a sentence with what was found and what was wanted,
 * and what to do next. */
class BundleException(val found: String, val hint: String, cause: Throwable? = null) :
    Exception("$found: $hint", cause)

internal const val COPY_AGAIN = "copy the bundle again from where it is whole, or export it again"
