// SPDX-License-Identifier: Apache-2.0

// Package inference reads a client's request once ([Parse]) and writes it back with small changes ([Edits]).
// Nothing is unmarshalled into maps and nothing is copied: what was found is kept as offsets ([Span]) into the
// chunks that arrived ([Body]), and a changed body is those chunks with byte splices between them. It also reads
// usage and finish reason out of responses, streamed or not. Floor 0.
package inference

// API is the wire format that a request path stands for.
type API uint8

// The APIs whose bodies Baton reads. Requests on any other path are [Unknown] and are routed by load alone.
const (
	Unknown        API = iota
	Chat               // /v1/chat/completions
	Completions        // /v1/completions
	Responses          // /v1/responses
	Embeddings         // /v1/embeddings
	Messages           // /v1/messages (Anthropic)
	Generate           // /inference/v1/generate (vLLM, tokens in, tokens out)
	SGLangGenerate     // /generate (SGLang)
)

// Header is one request header, name in lower case.
type Header struct{ Name, Value string }

// Headers are the request's headers in the order they came, pseudo headers included.
type Headers []Header

// Get returns the first value of name (lower case), "" when absent.
func (h Headers) Get(name string) string {
	for i := range h {
		if h[i].Name == name {
			return h[i].Value
		}
	}
	return ""
}

// Has reports whether name (lower case) is there.
func (h Headers) Has(name string) bool {
	for i := range h {
		if h[i].Name == name {
			return true
		}
	}
	return false
}

// Body is a request or response body as the slices that arrived. The slices are never written to.
type Body struct { //nolint:recvcheck // only Append changes it; the rest is asked of values, too
	Chunks [][]byte
	Len    int // total bytes
}

// Append adds a chunk; it keeps the slice.
func (b *Body) Append(chunk []byte) {
	if len(chunk) > 0 {
		b.Chunks = append(b.Chunks, chunk)
		b.Len += len(chunk)
	}
}

// Span is a range of byte offsets into a [Body], end exclusive.
type Span struct{ Start, End int }

// Len is the number of bytes in s.
func (s Span) Len() int { return s.End - s.Start }

// Bar is a set of reasons why a request cannot be disaggregated (docs/design.md 3.3).
type Bar uint16

// The bits of a [Bar].
const (
	BarEcho Bar = 1 << iota
	BarPromptLogprobs
	BarBestOf
	BarBeamSearch
	BarTruncatePrompt
	BarTruncation // Responses "truncation": "auto"
	BarPreviousResponse
	BarSeveralPrompts
	BarEmbeddings
	BarNotJSON // the body was not read: unknown path or no body
)

// The kinds of [Media].
const (
	ImageURL   = "image_url"
	AudioURL   = "audio_url"
	VideoURL   = "video_url"
	InputAudio = "input_audio"
)

// Media is one image, audio or video part of a prompt.
type Media struct {
	Kind string // ImageURL, AudioURL, VideoURL or InputAudio, whatever the API calls it
	Span Span   // the raw JSON value that holds the URL or the data
	Part Span   // the content part around it; empty for media beside the prompt
}

// Request is what [Parse] found. It is made once and not changed afterwards.
type Request struct {
	API     API
	Path    string // as sent, query included
	Method  string
	ID      string // x-request-id, made by the director when the client sent none
	Headers Headers
	Body    Body

	Model     string
	HasModel  bool
	Stream    bool
	MaxTokens int64 // the limit that applies to this API's answer, 31 bits at most; 0 = none sent, or none that is positive
	N         int64 // choices asked for, 31 bits at most; 1 when absent
	Prompts   int   // prompts in a batch; 1 for chat
	// Text lists, in body order, what the engine will tokenize: contents of JSON strings without their quotes and
	// still escaped, whole arrays of token ids (see TokenIDs), or the whole value of tools, tool_calls and a tool's
	// input. There are 16,384 at most: then the last one reaches over all that follows.
	Text      []Span
	TextBytes int     // sum of the spans
	TokenIDs  int     // number of token ids when the prompt is token ids; 0 for text
	Media     []Media // in body order, 4,096 at most
	CacheSalt string
	Bars      Bar
	// HasTransferFields says that the client sent fields that only a router may send (kv_transfer_params and its
	// like, docs/design.md 3.6), at the top level or in an object that becomes an engine's sampling_params or their
	// extra_args; [Edits.StripTransferFields] removes them.
	HasTransferFields bool

	scan scanned // offsets for edits
}

// PromptTokens estimates the prompt's length: the number of token ids, or four bytes of text to a token
// (llm-d's estimate, that of its token-producer).
func (r *Request) PromptTokens() int {
	if r.TokenIDs > 0 {
		return r.TokenIDs
	}
	return (r.TextBytes + 3) / 4
}
