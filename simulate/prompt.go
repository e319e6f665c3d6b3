// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"encoding/json"
	"strings"
)

// message is one message of a chat, in OpenAI's, the Responses' or Anthropic's shape.
type message struct {
	Role      string          `json:"role"`
	Content   json.RawMessage `json:"content"`
	ToolCalls json.RawMessage `json:"tool_calls"`
}

// part is one part of a message's content.
type part struct {
	Type string  `json:"type"`
	Text *string `json:"text"`
}

// readPrompt fills c.prompts. A prompt of a wrong shape leaves them empty or sets f.err.
func (e *Engine) readPrompt(c *call, f *fields) {
	switch c.api {
	case apiCompletions:
		c.readPrompts(f)
	case apiNative:
		c.readNativePrompts(f)
	case apiGenerate:
		if v, ok := f.raw("token_ids"); ok {
			c.addTokens(f, "token_ids", v)
		}
	case apiChat, apiMessages:
		var b promptBuilder
		if v, ok := f.raw("tools"); ok {
			b.raw(v)
		}
		if v, ok := f.raw("system"); ok && c.api == apiMessages {
			b.message(message{Role: "system", Content: v})
		}
		c.addMessages(f, "messages", &b)
	case apiResponses:
		var b promptBuilder
		if v, ok := f.raw("tools"); ok {
			b.raw(v)
		}
		if v, ok := f.raw("instructions"); ok {
			b.message(message{Role: "system", Content: v})
		}
		if v, ok := f.raw("input"); ok && v[0] == '"' {
			b.message(message{Role: "user", Content: v})
			c.prompts, c.media = [][]uint32{b.done()}, b.media
			return
		}
		c.addMessages(f, "input", &b)
	}
}

// readPrompts reads the prompt of /v1/completions: a text, token ids, or a list of either.
func (c *call) readPrompts(f *fields) {
	v, ok := f.raw("prompt")
	if !ok {
		return
	}
	if v[0] == '"' {
		c.addText(f, v)
		return
	}
	if v[0] != '[' {
		f.fail("prompt", "list_type", "Input should be a valid list", v)
		return
	}
	inner := strings.TrimLeft(string(v[1:min(len(v), 64)]), " \t\r\n")
	if inner == "" || (inner[0] != '"' && inner[0] != '[') {
		c.addTokens(f, "prompt", v)
		return
	}
	var list []json.RawMessage
	if err := json.Unmarshal(v, &list); err != nil {
		f.fail("prompt", "list_type", "Input should be a valid list", v)
		return
	}
	for _, one := range list {
		if len(one) > 0 && one[0] == '"' {
			c.addText(f, one)
		} else {
			c.addTokens(f, "prompt", one)
		}
	}
}

func (c *call) addText(f *fields, v json.RawMessage) {
	var s string
	if err := json.Unmarshal(v, &s); err != nil {
		f.fail("prompt", "string_type", "Input should be a valid string", v)
		return
	}
	c.texts = append(c.texts, s)
	c.prompts = append(c.prompts, tokenize(make([]uint32, 0, len(s)/pieceBytes+1), s))
}

func (c *call) addTokens(f *fields, name string, v json.RawMessage) {
	var ids []uint32
	if err := json.Unmarshal(v, &ids); err != nil {
		f.fail(name, "list_type", "Input should be a valid list of token ids", v)
		return
	}
	c.texts = append(c.texts, "")
	c.prompts = append(c.prompts, ids)
}

func (c *call) addMessages(f *fields, name string, b *promptBuilder) {
	v, ok := f.raw(name)
	if !ok {
		return
	}
	var list []message
	if err := json.Unmarshal(v, &list); err != nil {
		f.fail(name, "list_type", "Input should be a valid list of messages", v)
		return
	}
	if len(list) == 0 {
		f.fail(name, "too_short", "List should have at least 1 item after validation, not 0", v)
		return
	}
	for _, m := range list {
		b.message(m)
	}
	c.prompts, c.media = [][]uint32{b.done()}, b.media
}

// promptBuilder is the chat template: two tokens open a message, one closes it, two open the answer. Each text begins on
// a token of its own, so that a generated answer is tokenized back to itself.
type promptBuilder struct {
	tokens []uint32
	media  []mediaItem
}

func (b *promptBuilder) open(role string) {
	b.tokens = append(b.tokens, pieceID("<|"+role+"|>"), pieceID("\n"))
}

func (b *promptBuilder) message(m message) {
	b.open(m.Role)
	b.content(m.Content)
	if len(m.ToolCalls) > 0 {
		b.raw(m.ToolCalls)
	}
	b.tokens = append(b.tokens, pieceID("<|end|>"))
}

func (b *promptBuilder) content(v json.RawMessage) {
	var s string
	if len(v) > 0 && v[0] == '"' && json.Unmarshal(v, &s) == nil {
		b.tokens = tokenize(b.tokens, s)
		return
	}
	var parts []json.RawMessage
	if len(v) == 0 || v[0] != '[' || json.Unmarshal(v, &parts) != nil {
		b.raw(v)
		return
	}
	for _, raw := range parts {
		var p part
		switch err := json.Unmarshal(raw, &p); {
		case err != nil:
			b.raw(raw)
		case p.Text != nil:
			b.tokens = tokenize(b.tokens, *p.Text)
		default:
			if m, ok := readMedia(raw); ok {
				b.placeholders(m)
			} else {
				b.fill("part" + string(raw))
			}
		}
	}
}

func (b *promptBuilder) raw(v json.RawMessage) {
	if len(v) > 0 && string(v) != "null" {
		b.tokens = tokenize(b.tokens, string(v))
	}
}

func (b *promptBuilder) done() []uint32 {
	b.open("assistant")
	return b.tokens
}
