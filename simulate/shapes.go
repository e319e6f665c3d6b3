// SPDX-License-Identifier: Apache-2.0

package simulate

import "encoding/json"

// The JSON objects of vLLM 0.32, fields in the order that the real server writes them.

type null = *struct{}

type promptDetails struct {
	Cached     int  `json:"cached_tokens"`
	Created    *int `json:"created_cache_tokens"`
	Multimodal null `json:"multimodal_tokens"`
}

type usageBlock struct {
	Prompt     int            `json:"prompt_tokens"`
	Total      int            `json:"total_tokens"`
	Completion int            `json:"completion_tokens"`
	Details    *promptDetails `json:"prompt_tokens_details"`
	Completed  null           `json:"completion_tokens_details"`
}

type streamDetails struct {
	Cached  int  `json:"cached_tokens"`
	Created *int `json:"created_cache_tokens,omitempty"`
}

type streamUsage struct {
	Prompt     int            `json:"prompt_tokens"`
	Total      int            `json:"total_tokens"`
	Completion int            `json:"completion_tokens"`
	Details    *streamDetails `json:"prompt_tokens_details,omitempty"`
}

type completionChoice struct {
	Index          int             `json:"index"`
	Text           string          `json:"text"`
	Logprobs       json.RawMessage `json:"logprobs"`
	FinishReason   string          `json:"finish_reason"`
	StopReason     *string         `json:"stop_reason"`
	TokenIDs       []uint32        `json:"token_ids"`
	PromptLogprobs json.RawMessage `json:"prompt_logprobs"`
	PromptTokenIDs []uint32        `json:"prompt_token_ids"`
	RoutedExperts  null            `json:"routed_experts"`
}

type completion struct {
	ID                string             `json:"id"`
	Object            string             `json:"object"`
	Created           int64              `json:"created"`
	Model             string             `json:"model"`
	Choices           []completionChoice `json:"choices"`
	ServiceTier       null               `json:"service_tier"`
	SystemFingerprint string             `json:"system_fingerprint"`
	Usage             usageBlock         `json:"usage"`
	KVTransfer        json.RawMessage    `json:"kv_transfer_params"`
	ECTransfer        json.RawMessage    `json:"ec_transfer_params"`
	Metrics           null               `json:"metrics"`
}

type chatMessage struct {
	Role         string `json:"role"`
	Content      string `json:"content"`
	Refusal      null   `json:"refusal"`
	Annotations  null   `json:"annotations"`
	Audio        null   `json:"audio"`
	FunctionCall null   `json:"function_call"`
	Reasoning    null   `json:"reasoning"`
}

type chatChoice struct {
	Index         int             `json:"index"`
	Message       chatMessage     `json:"message"`
	Logprobs      json.RawMessage `json:"logprobs"`
	FinishReason  string          `json:"finish_reason"`
	StopReason    *string         `json:"stop_reason"`
	TokenIDs      []uint32        `json:"token_ids"`
	RoutedExperts null            `json:"routed_experts"`
}

type chatCompletion struct {
	ID                string          `json:"id"`
	Object            string          `json:"object"`
	Created           int64           `json:"created"`
	Model             string          `json:"model"`
	Choices           []chatChoice    `json:"choices"`
	ServiceTier       null            `json:"service_tier"`
	SystemFingerprint string          `json:"system_fingerprint"`
	Usage             usageBlock      `json:"usage"`
	PromptLogprobs    json.RawMessage `json:"prompt_logprobs"`
	PromptTokenIDs    []uint32        `json:"prompt_token_ids"`
	PromptText        null            `json:"prompt_text"`
	KVTransfer        json.RawMessage `json:"kv_transfer_params"`
	ECTransfer        json.RawMessage `json:"ec_transfer_params"`
	Metrics           null            `json:"metrics"`
}

// chunk is one event of a completion or chat stream.
type chunk struct {
	ID             string       `json:"id"`
	Object         string       `json:"object"`
	Created        int64        `json:"created"`
	Model          string       `json:"model"`
	Choices        any          `json:"choices"`
	Usage          *streamUsage `json:"usage,omitempty"`
	Fingerprint    string       `json:"system_fingerprint,omitempty"`
	PromptTokenIDs any          `json:"prompt_token_ids,omitempty"` // a null in chat's first chunk only
	PromptText     any          `json:"prompt_text,omitempty"`
}

type completionDelta struct {
	Index          int             `json:"index"`
	Text           string          `json:"text"`
	Logprobs       json.RawMessage `json:"logprobs"`
	FinishReason   *string         `json:"finish_reason"`
	StopReason     *string         `json:"stop_reason"`
	PromptTokenIDs []uint32        `json:"prompt_token_ids"`
	TokenIDs       []uint32        `json:"token_ids"`
}

type chatRole struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type chatRoleDelta struct {
	Index        int      `json:"index"`
	Delta        chatRole `json:"delta"`
	Logprobs     null     `json:"logprobs"`
	FinishReason null     `json:"finish_reason"`
}

type chatText struct {
	Content string `json:"content"`
}

type chatDelta struct {
	Index        int             `json:"index"`
	Delta        chatText        `json:"delta"`
	Logprobs     json.RawMessage `json:"logprobs"`
	FinishReason *string         `json:"finish_reason"`
	StopReason   json.RawMessage `json:"stop_reason,omitempty"` // on an answer's last chunk, null or a text
	TokenIDs     []uint32        `json:"token_ids"`
}

type generateChoice struct {
	Index          int             `json:"index"`
	FinishReason   string          `json:"finish_reason"`
	StopReason     *string         `json:"stop_reason"`
	TokenIDs       []uint32        `json:"token_ids"`
	RoutedExperts  null            `json:"routed_experts"`
	SamplingMask   null            `json:"sampling_mask"`
	WeightVersions []weightVersion `json:"weight_versions"`
	Logprobs       null            `json:"logprobs"`
}

type weightVersion struct {
	Version string `json:"version"`
	Start   int    `json:"start"`
	End     int    `json:"end"`
}

type generateAnswer struct {
	RequestID      string           `json:"request_id"`
	Model          string           `json:"model"`
	Created        int64            `json:"created"`
	Usage          usageBlock       `json:"usage"`
	PromptLogprobs null             `json:"prompt_logprobs"`
	PromptLogIDs   null             `json:"prompt_token_id_logprobs"`
	PromptTokenIDs null             `json:"prompt_token_ids"`
	Placeholders   null             `json:"mm_placeholders"`
	Metrics        null             `json:"metrics"`
	KVTransfer     json.RawMessage  `json:"kv_transfer_params"`
	ECTransfer     json.RawMessage  `json:"ec_transfer_params"`
	OutputMode     string           `json:"output_mode"`
	Choices        []generateChoice `json:"choices"`
}

type anthropicText struct {
	Type string `json:"type"`
	Text string `json:"text"`
}

type anthropicUsage struct {
	Input         int  `json:"input_tokens"`
	Output        int  `json:"output_tokens"`
	CacheCreation *int `json:"cache_creation_input_tokens,omitempty"`
	CacheRead     *int `json:"cache_read_input_tokens,omitempty"`
}

type anthropicMessage struct {
	ID         string          `json:"id"`
	Type       string          `json:"type"`
	Role       string          `json:"role"`
	Content    []anthropicText `json:"content"`
	Model      string          `json:"model"`
	StopReason string          `json:"stop_reason"`
	StopSeq    string          `json:"stop_sequence,omitempty"`
	Usage      anthropicUsage  `json:"usage"`
	KVTransfer json.RawMessage `json:"kv_transfer_params,omitempty"`
	ECTransfer json.RawMessage `json:"ec_transfer_params,omitempty"`
}

// anthropicStart is the message of message_start, where the stop fields are null.
type anthropicStart struct {
	ID         string          `json:"id"`
	Type       string          `json:"type"`
	Role       string          `json:"role"`
	Content    []anthropicText `json:"content"`
	Model      string          `json:"model"`
	StopReason null            `json:"stop_reason"`
	StopSeq    null            `json:"stop_sequence"`
	Usage      anthropicUsage  `json:"usage"`
}
