// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"encoding/json"
	"errors"
	"net/http"
	"strings"
)

// begin sends the headers of a stream. A real server does so before the request is scheduled: its first byte says
// nothing about the first token.
func (w *writer) begin() error {
	h := w.x.w.Header()
	h["Content-Type"] = []string{w.x.contentType("text/event-stream; charset=utf-8")}
	w.x.w.WriteHeader(http.StatusOK)
	w.begun = true
	return w.sse.flush()
}

// head is what comes before an answer's first token.
func (w *writer) head(q *sequence) error {
	switch w.c.api {
	case apiChat:
		role := []chatRoleDelta{{Index: q.index, Delta: chatRole{Role: "assistant"}}}
		ch := w.chunk(role)
		ch.PromptTokenIDs, ch.PromptText = json.RawMessage("null"), json.RawMessage("null")
		if w.c.returnTokens {
			ch.PromptTokenIDs = w.promptIDs(q)
		}
		return w.sse.data(marshal(ch))
	case apiMessages:
		start := anthropicStart{
			ID: w.c.id, Type: "message", Role: "assistant", Content: []anthropicText{}, Model: w.c.model,
			Usage: anthropicUsage{Input: w.c.promptTokens()},
		}
		return errors.Join(
			w.sse.event("message_start", marshal(struct {
				Type    string         `json:"type"`
				Message anthropicStart `json:"message"`
			}{"message_start", start})),
			w.sse.event("content_block_start", []byte(`{"type":"content_block_start","content_block":{"type":"text","text":""},"index":0}`)))
	case apiResponses:
		return w.responseHead()
	case apiCompletions, apiGenerate, apiNative:
	}
	return nil
}

func (w *writer) chunk(choices any) chunk {
	object := "text_completion"
	if w.c.api == apiChat {
		object = "chat.completion.chunk"
	}
	return chunk{ID: w.c.id, Object: object, Created: w.c.created, Model: w.c.model, Choices: choices}
}

// token sends one generated token. It is the stream's emitter.
func (w *writer) token(q *sequence, id uint32, text string) error {
	if len(q.generated) == 1 {
		if err := w.head(q); err != nil {
			return errClientGone
		}
		if w.c.echo {
			text = w.c.echoText(q) + text
		}
	}
	var err error
	switch w.c.api {
	case apiMessages:
		err = w.sse.event("content_block_delta", []byte(`{"type":"content_block_delta","delta":{"type":"text_delta","text":`+
			string(marshal(text))+`},"index":0}`))
	case apiResponses:
		err = w.responseEvent("response.output_text.delta", responseDeltaEvent{
			Delta: text, Item: w.itemID(), Logprobs: []string{}, Sequence: w.sequence, Type: "response.output_text.delta",
		})
	case apiCompletions, apiChat, apiGenerate:
		err = w.sse.data(marshal(w.tokenChunk(q, id, text)))
	case apiNative:
		err = w.sse.data(marshal(w.nativeAnswer(q)))
	}
	if err != nil {
		return errClientGone
	}
	return nil
}

func (w *writer) tokenChunk(q *sequence, id uint32, text string) chunk {
	var finish *string
	if q.finish != "" {
		finish = &q.finish
		if w.x.fault != nil && w.x.fault.Kind == faultFinishError {
			finish = new(finishError)
		}
	}
	var ids []uint32
	if w.c.returnTokens && len(q.generated) > 0 {
		ids = []uint32{id}
	}
	var ch chunk
	if w.c.api == apiChat {
		d := chatDelta{Index: q.index, Delta: chatText{text}, FinishReason: finish, TokenIDs: ids}
		if finish != nil {
			d.StopReason = marshal(stopReason(q))
		}
		if w.c.logprobs >= 0 {
			d.Logprobs = chatLogprobs([]uint32{id}, w.c.logprobs)
		}
		ch = w.chunk([]chatDelta{d})
	} else {
		d := completionDelta{Index: q.index, Text: text, FinishReason: finish, StopReason: stopReason(q), TokenIDs: ids}
		if len(q.generated) == 1 {
			d.PromptTokenIDs = w.promptIDs(q)
		}
		ch = w.chunk([]completionDelta{d})
	}
	if w.c.contUsage && w.c.usage {
		ch.Usage = &streamUsage{Prompt: w.c.promptTokens(), Completion: w.generated()}
		ch.Usage.Total = ch.Usage.Prompt + ch.Usage.Completion
	}
	if !w.c.usage && w.finished() {
		ch.Fingerprint = fingerprint
	}
	return ch
}

// finished reports whether every answer has its end.
func (w *writer) finished() bool {
	for _, q := range w.g.seqs {
		if q.finish == "" {
			return false
		}
	}
	return true
}

// end closes a stream. A client that is gone is not told so.
func (w *writer) end() {
	defer w.sse.drain()
	switch w.c.api {
	case apiMessages:
		w.messageEnd()
		return
	case apiResponses:
		w.responseEnd()
		return
	case apiCompletions, apiChat, apiGenerate, apiNative:
	}
	if w.c.usage {
		ch := w.chunk([]string{})
		ch.Usage, ch.Fingerprint = w.streamUsage(), fingerprint
		if w.sse.data(marshal(ch)) != nil {
			return
		}
	}
	_ = w.sse.data([]byte("[DONE]"))
}

func (w *writer) messageEnd() {
	q := w.g.seqs[0]
	delta := struct {
		Type  string `json:"type"`
		Delta struct {
			Reason string  `json:"stop_reason"`
			Seq    *string `json:"stop_sequence"`
		} `json:"delta"`
		Usage anthropicUsage `json:"usage"`
	}{Type: "message_delta", Usage: w.anthropicUsage()}
	delta.Delta.Reason, delta.Delta.Seq = anthropicStop(q), stopReason(q)
	_ = errors.Join(
		w.sse.event("content_block_stop", []byte(`{"type":"content_block_stop","index":0}`)),
		w.sse.event("message_delta", marshal(delta)),
		w.sse.event("message_stop", []byte(`{"type":"message_stop"}`)))
}

// streamError ends a stream that has begun: an error object in the place of a chunk.
func (w *writer) streamError(e *apiError) {
	defer w.sse.drain()
	body := w.x.errorEvent(e)
	if w.c.api == apiMessages {
		_ = w.sse.event("error", body)
		return
	}
	if w.sse.data(body) == nil {
		_ = w.sse.data([]byte("[DONE]"))
	}
}

// responseEvent sends an event and counts it; v must carry the present sequence number.
func (w *writer) responseEvent(name string, v any) error {
	w.sequence++
	return w.sse.event(name, marshal(v))
}

func (w *writer) responseHead() error {
	for _, name := range []string{"response.created", "response.in_progress"} {
		if err := w.responseEvent(name, responseEvent{w.response(nil, false), w.sequence, name}); err != nil {
			return err
		}
	}
	item := responseItem{ID: w.itemID(), Content: []responseText{}, Role: "assistant", Status: "in_progress", Type: "message"}
	part := responseText{Annotations: []string{}, Type: "output_text", Logprobs: json.RawMessage("[]")}
	const added, partAdded = "response.output_item.added", "response.content_part.added"
	if err := w.responseEvent(added, responseItemEvent{Item: item, Sequence: w.sequence, Type: added}); err != nil {
		return err
	}
	return w.responseEvent(partAdded, responsePartEvent{Item: item.ID, Part: part, Sequence: w.sequence, Type: partAdded})
}

func (w *writer) responseEnd() {
	item := w.responseItem()
	const textDone, partDone = "response.output_text.done", "response.content_part.done"
	const itemDone, completed = "response.output_item.done", "response.completed"
	err := w.responseEvent(textDone, responseDoneEvent{
		Item: item.ID, Logprobs: []string{}, Sequence: w.sequence, Text: item.Content[0].Text, Type: textDone,
	})
	if err == nil {
		err = w.responseEvent(partDone, responsePartEvent{Item: item.ID, Part: item.Content[0], Sequence: w.sequence, Type: partDone})
	}
	if err == nil {
		err = w.responseEvent(itemDone, responseItemEvent{Item: item, Sequence: w.sequence, Type: itemDone})
	}
	if err == nil {
		_ = w.responseEvent(completed, responseEvent{w.response(nil, true), w.sequence, completed})
	}
}

// contentType is t, or what a fault makes of it.
func (x *exchange) contentType(t string) string {
	if x.fault != nil && x.fault.Kind == faultContentType {
		return "text/html; charset=utf-8"
	}
	return t
}

// sse writes server-sent events, each in one flush, with the faults that break streams.
type sse struct {
	x      *exchange
	rc     *http.ResponseController
	events int
	held   string // by a fault that cuts the stream elsewhere than between events
}

func (s *sse) data(payload []byte) error { return s.event("", payload) }

func (s *sse) event(name string, payload []byte) error {
	var b strings.Builder
	b.Grow(len(payload) + len(name) + 16)
	if name != "" {
		b.WriteString("event: " + name + "\n")
	}
	b.WriteString("data: ")
	b.Write(payload)
	b.WriteString("\n\n")
	s.events++
	if f := s.x.fault; f != nil {
		return s.breakEvent(f, b.String())
	}
	return s.write(b.String())
}

func (s *sse) write(text string) error {
	if _, err := s.x.w.Write([]byte(text)); err != nil {
		return err
	}
	return s.flush()
}

func (s *sse) flush() error { return s.rc.Flush() }
