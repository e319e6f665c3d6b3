// SPDX-License-Identifier: Apache-2.0

package inference

import "bytes"

// A name is a key of a request's top level, or of its sampling_params, that means something to Baton.
type name uint8

// Scalars come first: their last values are kept until the body was read, so that the last duplicate wins.
const (
	other name = iota
	model
	stream
	maxTokens
	maxCompletionTokens
	maxOutputTokens
	maxNewTokens
	choices
	cacheSalt
	extraKey
	echo
	promptLogprobs
	bestOf
	useBeamSearch
	truncatePromptTokens
	truncation
	previousResponseID
	scalars
	messages
	tools
	prompt
	promptEmbeds
	input
	instructions
	system
	tokenIDs
	plainText
	inputIDs
	imageData
	audioData
	videoData
	samplingParams
	extraArgs
	transfer // kv_transfer_params and its like
	names
)

var nameOf = map[string]name{
	"model": model, "stream": stream, "max_tokens": maxTokens, "max_completion_tokens": maxCompletionTokens,
	"max_output_tokens": maxOutputTokens, "max_new_tokens": maxNewTokens, "n": choices,
	"cache_salt": cacheSalt, "extra_key": extraKey, "echo": echo, "prompt_logprobs": promptLogprobs,
	"best_of": bestOf, "use_beam_search": useBeamSearch, "truncate_prompt_tokens": truncatePromptTokens,
	"truncation": truncation, "previous_response_id": previousResponseID,
	"messages": messages, "tools": tools, "prompt": prompt, "prompt_embeds": promptEmbeds, "input": input,
	"instructions": instructions, "system": system, "token_ids": tokenIDs, "text": plainText,
	"input_ids": inputIDs, "image_data": imageData, "audio_data": audioData, "video_data": videoData,
	samplingParamsKey: samplingParams, "extra_args": extraArgs, "vllm_xargs": extraArgs,
	"kv_transfer_params": transfer, "ec_transfer_params": transfer, "disaggregated_params": transfer,
}

// samplingParamsKey is the object in which Generate and SGLangGenerate carry most of their parameters.
const samplingParamsKey = "sampling_params"

// lookUp knows the keys above and all of bootstrap_*, which only a router may send either (docs/design.md 3.6).
func lookUp(key []byte) name {
	n := nameOf[string(key)]
	if n == other && bytes.HasPrefix(key, []byte("bootstrap_")) {
		return transfer
	}
	return n
}

// A reading is how a value becomes prompt.
type reading uint8

const (
	skipped reading = iota
	asText          // text in whatever shape: a string, a list, messages, content parts
	asWhole         // the whole value, as with tools, which templates print as JSON
	asBatch         // one prompt or several: text, token ids, or lists of these
	asCount         // prompts that are counted but not looked into
	asImage         // media, one or a list
	asAudio
	asVideo
	asInputAudio
)

// readings says which fields of the top level each API puts into its prompts.
var readings = [...][names]reading{
	Unknown:        {},
	Chat:           {messages: asText, tools: asWhole},
	Completions:    {prompt: asBatch, promptEmbeds: asCount},
	Responses:      {instructions: asText, input: asText, tools: asWhole},
	Embeddings:     {input: asBatch, messages: asText},
	Messages:       {system: asText, messages: asText, tools: asWhole},
	Generate:       {tokenIDs: asBatch},
	SGLangGenerate: {plainText: asBatch, inputIDs: asBatch, imageData: asImage, audioData: asAudio, videoData: asVideo},
}

// A partKey is a key of a message, a content part or an item of a Responses input: these nest and share their keys.
type partKey struct {
	slot int // one per key, from 1
	how  reading
}

const (
	typeSlot   = 1
	sourceSlot = 2 // Anthropic's media
	partSlots  = 19
)

var partKeys = map[string]partKey{
	"type": {typeSlot, skipped}, "source": {sourceSlot, skipped}, "role": {3, asText}, "content": {4, asText},
	"text": {5, asText}, "name": {6, asText}, "arguments": {7, asText}, "output": {8, asText},
	"reasoning": {9, asText}, "reasoning_content": {10, asText}, "refusal": {11, asText}, "thinking": {12, asText},
	"input": {13, asWhole}, "tool_calls": {14, asWhole}, ImageURL: {15, asImage}, AudioURL: {16, asAudio},
	VideoURL: {17, asVideo}, InputAudio: {18, asInputAudio},
}
