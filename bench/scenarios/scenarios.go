// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
)

// scenarios lists them in the order in which they are run: what ends a server comes last.
func scenarios() []scenario {
	return slices.Concat([]scenario{
		{"pair", "prefill, then decode with the handle", "pulled blocks late failed", pair},
		{"twice", "a handle used twice at once", "late failed", twice},
		{"cancel", "prefill cancelled midway", "blocks", cancelled},
		{"abandoned", "decode never sent", "blocks", abandoned},
		{"min-tokens", "`min_tokens: 3` left on the prefill leg", "blocks", tooFew},
		{"n-decode", "`n: 2` at decode, one handle", "pulled blocks late failed", severalDecoded},
		{"n-prefill", "`n: 2` at prefill, `n: 1` at decode", "pulled blocks late", severalPrefilled},
		{"stream", "`stream: true` at prefill", "blocks", streamed},
		{"one-token", "`max_tokens: 1` at decode", "pulled blocks", oneToken},
		{"two-prompts", "two prompts in one prefill request, the first one decoded", "pulled blocks", twoPrompts},
		{"chat", "both legs to `/v1/chat/completions`", "pulled blocks", written(pathChat)},
		{"responses", "both legs to `/v1/responses`", "pulled blocks", written(pathResponses)},
		{"messages", "both legs to `/v1/messages`", "pulled blocks", written(pathMessages)},
		{"stop", "`min_tokens: 2` and `stop` at decode", "pulled blocks", stopped},
	}, throughBaton(), []scenario{
		{"restart-fail", "a handle of a prefill server that was restarted, policy fail", "", restartedFail},
		{"restart-recompute", "the same, policy recompute", "", restartedRecompute},
		{"no-block-ids", "a handle without block ids", "", noBlockIDs},
	})
}

// claim sends the prefill leg of q and returns its handle.
func (t *trial) claim(ctx context.Context, q request) (*reply, error) {
	r, err := t.prefill.ask(ctx, q.forPrefill())
	if err != nil {
		return nil, err
	}
	t.add("prefill", prefilled(r))
	if r.handle == nil {
		return nil, fmt.Errorf("prefill without a handle: %.200s", r.body)
	}
	return r, nil
}

func prefilled(r *reply) string {
	out := strconv.Itoa(r.status) + ", no handle"
	switch {
	case r.handle != nil:
		out = strconv.Itoa(r.status) + ", handle"
	case r.handed:
		out = strconv.Itoa(r.status) + ", handle inside the stream"
	}
	return out
}

// decoded sends the decode leg of q and, if it was answered, the same request without a handle.
func (t *trial) decoded(ctx context.Context, name string, q request, handle *reply) (*reply, error) {
	r, err := t.decode.ask(ctx, q.forDecode(handle.handle))
	if err != nil {
		return nil, err
	}
	return r, t.compare(ctx, name, q, r)
}

// compare says how r differs from what the decode server answers without any help.
func (t *trial) compare(ctx context.Context, name string, q request, r *reply) error {
	if r.status != http.StatusOK {
		t.add(name, strconv.Itoa(r.status))
		return nil
	}
	want, err := t.decode.ask(ctx, q.alone())
	if err != nil {
		return err
	}
	t.prompt = want.prompt
	said := "200, same text"
	switch {
	case len(want.texts) == 0 || want.texts[0] == "":
		return fmt.Errorf("no answer to compare with: %d %.200s", want.status, want.body)
	case !slices.Equal(r.texts, want.texts):
		said = "200, OTHER text"
	case r.finish != want.finish:
		said = "200, other finish reason: " + r.finish
	}
	if r.handed {
		said += ", a handle in the answer"
	}
	t.add(name, said)
	return nil
}

// legs are both legs of q.
func (t *trial) legs(ctx context.Context, q request) error {
	p, err := t.claim(ctx, q)
	if err != nil {
		return err
	}
	_, err = t.decoded(ctx, "decode", q, p)
	return err
}

func pair(ctx context.Context, t *trial) error { return t.legs(ctx, t.completion(promptTokens)) }

func written(path string) func(context.Context, *trial) error {
	return func(ctx context.Context, t *trial) error { return t.legs(ctx, t.written(path)) }
}

func twice(ctx context.Context, t *trial) error {
	q := t.completion(promptTokens)
	p, err := t.claim(ctx, q)
	if err != nil {
		return err
	}
	type result struct {
		r   *reply
		err error
	}
	results := make(chan result, 2)
	for range 2 {
		go func() {
			r, err := t.decode.ask(ctx, q.forDecode(p.handle))
			results <- result{r, err}
		}()
	}
	one, two := <-results, <-results
	if err := errors.Join(one.err, two.err); err != nil {
		return err
	}
	return errors.Join(t.compare(ctx, "one decode", q, one.r), t.compare(ctx, "the other", q, two.r))
}

func cancelled(ctx context.Context, t *trial) error {
	q := t.completion(longPrompt).forPrefill()
	return t.cancelMidway(ctx, func(ctx context.Context) error {
		_, err := t.prefill.ask(ctx, q)
		return err
	})
}

// cancelMidway cancels send while the prefill server works on it, and watches the blocks.
func (t *trial) cancelMidway(ctx context.Context, send func(context.Context) error) error {
	legCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- send(legCtx) }()
	working := func() bool {
		r, err := t.prefill.read(ctx)
		return err == nil && r.running > 0 && r.usage > 0
	}
	if !poll(ctx, answerLimit, working) {
		return errors.New("the prefill server was never seen at work")
	}
	cancel()
	if err := <-ended; err == nil {
		return errors.New("the prefill was over before it was cancelled")
	}
	free := func() bool {
		r, err := t.prefill.read(ctx)
		return err == nil && r.quiet()
	}
	is := "yes"
	if !poll(ctx, t.soon, free) {
		is = "no"
	}
	t.add("blocks free again within a second", is)
	return nil
}

func abandoned(ctx context.Context, t *trial) error {
	_, err := t.claim(ctx, t.completion(promptTokens))
	return err
}

func tooFew(ctx context.Context, t *trial) error {
	r, err := t.prefill.ask(ctx, t.completion(promptTokens).with("min_tokens", 3).forPrefill())
	if err != nil {
		return err
	}
	t.add("prefill", prefilled(r))
	return nil
}

// several makes q ask for two answers.
func several(q request) request { return q.with("n", 2, "temperature", barely) }

func severalDecoded(ctx context.Context, t *trial) error {
	q := t.completion(promptTokens)
	p, err := t.claim(ctx, q)
	if err != nil {
		return err
	}
	r, err := t.decoded(ctx, "decode", several(q), p)
	if err != nil {
		return err
	}
	t.add("choices", strconv.Itoa(len(r.texts)))
	return nil
}

func severalPrefilled(ctx context.Context, t *trial) error {
	q := t.completion(promptTokens)
	p, err := t.claim(ctx, several(q))
	if err != nil {
		return err
	}
	_, err = t.decoded(ctx, "decode", q, p)
	return err
}

func streamed(ctx context.Context, t *trial) error {
	r, err := t.prefill.ask(ctx, t.completion(promptTokens).with("stream", true).forPrefill())
	if err != nil {
		return err
	}
	t.add("prefill", prefilled(r))
	return nil
}

func oneToken(ctx context.Context, t *trial) error {
	return t.legs(ctx, t.completion(promptTokens).with("max_tokens", 1))
}

func twoPrompts(ctx context.Context, t *trial) error {
	first, second := newPrompt(promptTokens), newPrompt(promptTokens)
	p, err := t.claim(ctx, t.completionOf([][]int{first, second}))
	if err != nil {
		return err
	}
	_, err = t.decoded(ctx, "decode", t.completionOf(first), p)
	return err
}

// stopped looks for what the answer says in its middle and asks for it to stop there.
func stopped(ctx context.Context, t *trial) error {
	q := t.completion(promptTokens)
	whole, err := t.decode.ask(ctx, q.alone())
	if err != nil {
		return err
	}
	stop := middle(whole.texts)
	if stop == "" {
		return fmt.Errorf("nothing to stop at in %q", whole.texts)
	}
	q = q.with("stop", []string{stop}, "min_tokens", 2)
	p, err := t.claim(ctx, q.with("min_tokens", 0))
	if err != nil {
		return err
	}
	r, err := t.decoded(ctx, "decode", q, p)
	if err != nil {
		return err
	}
	t.add("finish reason", r.finish)
	return nil
}

// middle finds three ASCII letters in the second half of a text.
func middle(texts []string) string {
	if len(texts) == 0 {
		return ""
	}
	text := texts[0]
	for i := len(text) / 2; i+3 <= len(text); i++ {
		letters := text[i : i+3]
		if !slices.ContainsFunc([]byte(letters), func(c byte) bool { return c|0x20 < 'a' || c|0x20 > 'z' }) {
			return letters
		}
	}
	return ""
}
