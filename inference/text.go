// SPDX-License-Identifier: Apache-2.0

package inference

// String is the API's name in metrics and in /debug/decisions.
func (a API) String() string {
	switch a {
	case Chat:
		return "chat"
	case Completions:
		return "completions"
	case Responses:
		return "responses"
	case Embeddings:
		return "embeddings"
	case Messages:
		return "messages"
	case Generate:
		return "generate"
	case SGLangGenerate:
		return "sglang-generate"
	default:
		return "unknown"
	}
}

// String names the first reason in b, in words fit for a label: what keeps the request from being disaggregated.
func (b Bar) String() string {
	names := [...]string{
		"echo", "prompt-logprobs", "best-of", "beam-search", "truncate-prompt", "truncation", "previous-response",
		"several-prompts", "embeddings", "not-json",
	}
	for i, name := range names {
		if b&(1<<i) != 0 {
			return name
		}
	}
	return "none"
}
