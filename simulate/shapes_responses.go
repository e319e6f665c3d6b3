// SPDX-License-Identifier: Apache-2.0

package simulate

import "encoding/json"

type responseText struct {
	Annotations []string        `json:"annotations"`
	Text        string          `json:"text"`
	Type        string          `json:"type"`
	Logprobs    json.RawMessage `json:"logprobs"`
}

type responseItem struct {
	ID      string         `json:"id"`
	Content []responseText `json:"content"`
	Role    string         `json:"role"`
	Status  string         `json:"status"`
	Type    string         `json:"type"`
	Phase   null           `json:"phase"`
}

type responseUsage struct {
	Input        int `json:"input_tokens"`
	InputDetails struct {
		Cached        int   `json:"cached_tokens"`
		CacheWrite    int   `json:"cache_write_tokens"`
		PerTurn       []int `json:"input_tokens_per_turn"`
		CachedPerTurn []int `json:"cached_tokens_per_turn"`
	} `json:"input_tokens_details"`
	Output        int `json:"output_tokens"`
	OutputDetails struct {
		Reasoning   int   `json:"reasoning_tokens"`
		ToolOutput  int   `json:"tool_output_tokens"`
		PerTurn     []int `json:"output_tokens_per_turn"`
		ToolPerTurn []int `json:"tool_output_tokens_per_turn"`
	} `json:"output_tokens_details"`
	Total int `json:"total_tokens"`
}

type responseIncomplete struct {
	Reason string `json:"reason"`
}

type response struct {
	ID                string              `json:"id"`
	CreatedAt         int64               `json:"created_at"`
	IncompleteDetails *responseIncomplete `json:"incomplete_details"`
	Instructions      null                `json:"instructions"`
	Metadata          null                `json:"metadata"`
	Model             string              `json:"model"`
	Object            string              `json:"object"`
	Output            []responseItem      `json:"output"`
	ParallelToolCalls bool                `json:"parallel_tool_calls"`
	Temperature       json.RawMessage     `json:"temperature"`
	ToolChoice        string              `json:"tool_choice"`
	Tools             []string            `json:"tools"`
	TopP              json.RawMessage     `json:"top_p"`
	Background        bool                `json:"background"`
	MaxOutputTokens   int                 `json:"max_output_tokens"`
	MaxToolCalls      null                `json:"max_tool_calls"`
	PreviousResponse  null                `json:"previous_response_id"`
	Prompt            null                `json:"prompt"`
	Reasoning         null                `json:"reasoning"`
	ServiceTier       string              `json:"service_tier"`
	Status            string              `json:"status"`
	Text              null                `json:"text"`
	TopLogprobs       null                `json:"top_logprobs"`
	Truncation        string              `json:"truncation"`
	Usage             *responseUsage      `json:"usage"`
	User              null                `json:"user"`
	PresencePenalty   json.RawMessage     `json:"presence_penalty"`
	FrequencyPenalty  json.RawMessage     `json:"frequency_penalty"`
	KVTransfer        json.RawMessage     `json:"kv_transfer_params"`
	ECTransfer        json.RawMessage     `json:"ec_transfer_params"`
	InputMessages     null                `json:"input_messages"`
	OutputMessages    null                `json:"output_messages"`
}

type responseEvent struct {
	Response *response `json:"response"`
	Sequence int       `json:"sequence_number"`
	Type     string    `json:"type"`
}

type responseItemEvent struct {
	Item     responseItem `json:"item"`
	Output   int          `json:"output_index"`
	Sequence int          `json:"sequence_number"`
	Type     string       `json:"type"`
}

type responsePartEvent struct {
	Content  int          `json:"content_index"`
	Item     string       `json:"item_id"`
	Output   int          `json:"output_index"`
	Part     responseText `json:"part"`
	Sequence int          `json:"sequence_number"`
	Type     string       `json:"type"`
}

type responseDeltaEvent struct {
	Content  int      `json:"content_index"`
	Delta    string   `json:"delta"`
	Item     string   `json:"item_id"`
	Logprobs []string `json:"logprobs"`
	Output   int      `json:"output_index"`
	Sequence int      `json:"sequence_number"`
	Type     string   `json:"type"`
}

type responseDoneEvent struct {
	Content  int      `json:"content_index"`
	Item     string   `json:"item_id"`
	Logprobs []string `json:"logprobs"`
	Output   int      `json:"output_index"`
	Sequence int      `json:"sequence_number"`
	Text     string   `json:"text"`
	Type     string   `json:"type"`
}
