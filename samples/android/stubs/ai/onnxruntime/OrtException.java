package ai.onnxruntime;

/** What the app uses of onnxruntime-android, so that its calls can be compiled without it. */
public class OrtException extends Exception {}
