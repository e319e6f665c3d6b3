// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"encoding/json"
	"net/http"
)

const fingerprint = "vllm-0.32.0-b855c885"

// writer turns a group's progress into an answer.
type writer struct {
	p   *process
	x   *exchange
	c   *call
	g   *group
	sse sse

	begun     bool            // a stream's headers are out
	encodings json.RawMessage // ec_transfer_params of an encode leg's answer

	// Of a Responses stream.
	item     string
	sequence int
}

func newWriter(p *process, x *exchange, g *group) *writer {
	return &writer{p: p, x: x, c: x.call, g: g, sse: sse{x: x, rc: http.NewResponseController(x.w)}}
}

// cachedTokens is what usage reports as cached: in 0.32 the prefill engine's own count on a decode leg, in the old
// generation everything that was not computed here.
func (w *writer) cachedTokens() int {
	if t := w.c.transfer; t != nil && w.g.remote != nil && w.p.e.opts.Generation != generationOld {
		return t.cachedTokens
	}
	n := 0
	for _, q := range w.g.seqs {
		if q.sibling == nil {
			n += q.cached
			if w.p.e.opts.Generation == generationOld {
				n += q.remote
			}
		}
	}
	return n
}

func (w *writer) createdTokens() int {
	n := 0
	for _, q := range w.g.seqs {
		n += q.created
	}
	return n
}

func (w *writer) generated() int {
	n := 0
	for _, q := range w.g.seqs {
		n += len(q.generated)
	}
	return n
}

func (w *writer) usage() usageBlock {
	u := usageBlock{Prompt: w.c.promptTokens(), Completion: w.generated()}
	u.Total = u.Prompt + u.Completion
	if !w.p.e.opts.HidePromptDetail && w.c.api != apiGenerate {
		u.Details = &promptDetails{Cached: w.cachedTokens(), Created: w.createdField()}
	}
	return u
}

// createdField is set for chat only.
func (w *writer) createdField() *int {
	if w.c.api != apiChat {
		return nil
	}
	return new(w.createdTokens())
}

func (w *writer) streamUsage() *streamUsage {
	u := &streamUsage{Prompt: w.c.promptTokens(), Completion: w.generated()}
	u.Total = u.Prompt + u.Completion
	if !w.p.e.opts.HidePromptDetail {
		u.Details = &streamDetails{Cached: w.cachedTokens(), Created: w.createdField()}
	}
	return u
}

// whole is the answer to a request that is not streamed.
func (w *writer) whole(kv json.RawMessage) []byte {
	switch w.c.api {
	case apiChat:
		return w.wholeChat(kv)
	case apiResponses:
		return marshal(w.response(kv, true))
	case apiMessages:
		return w.wholeMessage(kv)
	case apiGenerate:
		return w.wholeGenerate(kv)
	case apiNative:
		return w.wholeNative()
	case apiCompletions:
	}
	return w.wholeCompletion(kv)
}

func (w *writer) ids(q *sequence) []uint32 {
	if !w.c.returnTokens {
		return nil
	}
	return q.generated
}

func (w *writer) promptIDs(q *sequence) []uint32 {
	if !w.c.returnTokens {
		return nil
	}
	return w.c.prompts[q.index/w.c.n]
}

func stopReason(q *sequence) *string {
	if q.stopReason == "" {
		return nil
	}
	return &q.stopReason
}

func (w *writer) wholeCompletion(kv json.RawMessage) []byte {
	c := w.c
	a := completion{
		ID: c.id, Object: "text_completion", Created: c.created, Model: c.model, SystemFingerprint: fingerprint,
		Usage: w.usage(), KVTransfer: kv, ECTransfer: w.encodings,
	}
	for _, q := range w.g.seqs {
		text := string(q.text)
		if c.echo {
			text = c.echoText(q) + text
		}
		ch := completionChoice{
			Index: q.index, Text: text, FinishReason: q.finish, StopReason: stopReason(q), TokenIDs: w.ids(q),
			PromptTokenIDs: w.promptIDs(q),
		}
		if c.logprobs >= 0 {
			ch.Logprobs = completionLogprobs(q, c.logprobs)
		}
		a.Choices = append(a.Choices, ch)
	}
	return marshal(a)
}

// echoText is a prompt as text.
func (c *call) echoText(q *sequence) string {
	i := q.index / c.n
	if c.texts[i] != "" {
		return c.texts[i]
	}
	return detokenize(c.prompts[i])
}

func detokenize(ids []uint32) string {
	out := make([]byte, 0, len(ids)*pieceBytes)
	for _, id := range ids {
		out = append(out, tokenText(id)...)
	}
	return string(out)
}

func (w *writer) wholeChat(kv json.RawMessage) []byte {
	c := w.c
	a := chatCompletion{
		ID: c.id, Object: "chat.completion", Created: c.created, Model: c.model, SystemFingerprint: fingerprint,
		Usage: w.usage(), KVTransfer: kv, ECTransfer: w.encodings, PromptTokenIDs: w.promptIDs(w.g.seqs[0]),
	}
	for _, q := range w.g.seqs {
		ch := chatChoice{
			Index: q.index, Message: chatMessage{Role: "assistant", Content: string(q.text)}, FinishReason: q.finish,
			StopReason: stopReason(q), TokenIDs: w.ids(q),
		}
		if c.logprobs >= 0 {
			ch.Logprobs = chatLogprobs(q.generated, c.logprobs)
		}
		a.Choices = append(a.Choices, ch)
	}
	return marshal(a)
}

func (w *writer) wholeGenerate(kv json.RawMessage) []byte {
	c := w.c
	a := generateAnswer{
		RequestID: c.id, Model: c.model, Created: c.created, Usage: w.usage(), KVTransfer: kv, ECTransfer: w.encodings, OutputMode: "tokens",
	}
	for _, q := range w.g.seqs {
		a.Choices = append(a.Choices, generateChoice{
			Index: q.index, FinishReason: q.finish, StopReason: stopReason(q), TokenIDs: q.generated,
			WeightVersions: []weightVersion{{Version: "default", End: len(q.generated)}},
		})
	}
	return marshal(a)
}

// anthropicStop translates a finish reason.
func anthropicStop(q *sequence) string {
	switch {
	case q.finish == finishLength:
		return "max_tokens"
	case q.stopReason != "":
		return "stop_sequence"
	}
	return "end_turn"
}

func (w *writer) anthropicUsage() anthropicUsage {
	cached := min(w.cachedTokens(), w.c.promptTokens())
	return anthropicUsage{
		Input: w.c.promptTokens() - cached, Output: w.generated(), CacheCreation: new(0), CacheRead: &cached,
	}
}

func (w *writer) wholeMessage(kv json.RawMessage) []byte {
	q := w.g.seqs[0]
	return marshal(anthropicMessage{
		ID: w.c.id, Type: "message", Role: "assistant", Content: []anthropicText{{"text", string(q.text)}}, Model: w.c.model,
		StopReason: anthropicStop(q), StopSeq: q.stopReason, Usage: w.anthropicUsage(), KVTransfer: kv, ECTransfer: w.encodings,
	})
}

// response is the object of /v1/responses; done is false for the events before the answer.
func (w *writer) response(kv json.RawMessage, done bool) *response {
	c, q := w.c, w.g.seqs[0]
	a := &response{
		ID: c.id, CreatedAt: c.created, Model: c.model, Object: "response", Output: []responseItem{}, ParallelToolCalls: true,
		Temperature: json.RawMessage(pythonFloat(c.temperature)), ToolChoice: "none", Tools: []string{},
		TopP: json.RawMessage("1.0"), MaxOutputTokens: c.limit(q), ServiceTier: "auto", Status: "in_progress",
		Truncation: "disabled", PresencePenalty: json.RawMessage("0.0"), FrequencyPenalty: json.RawMessage("0.0"), KVTransfer: kv, ECTransfer: w.encodings,
	}
	if !done {
		return a
	}
	a.Status = "completed"
	if q.finish == finishLength {
		a.Status = "incomplete"
		a.IncompleteDetails = &responseIncomplete{"max_output_tokens"}
	}
	a.Output = append(a.Output, w.responseItem())
	u := &responseUsage{Input: c.promptTokens(), Output: w.generated()}
	u.Total = u.Input + u.Output
	u.InputDetails.Cached, u.InputDetails.CacheWrite = w.cachedTokens(), w.createdTokens()
	u.InputDetails.PerTurn, u.InputDetails.CachedPerTurn = []int{}, []int{}
	u.OutputDetails.PerTurn, u.OutputDetails.ToolPerTurn = []int{}, []int{}
	a.Usage = u
	return a
}

func (w *writer) itemID() string {
	if w.item == "" {
		w.item = "msg_" + w.p.e.hex(8)
	}
	return w.item
}

func (w *writer) responseItem() responseItem {
	return responseItem{
		ID: w.itemID(), Role: "assistant", Status: "completed", Type: "message",
		Content: []responseText{{Annotations: []string{}, Text: string(w.g.seqs[0].text), Type: "output_text"}},
	}
}
