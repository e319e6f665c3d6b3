// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"net/http"
	"syscall"
)

func restartedFail(ctx context.Context, t *trial) error { return t.restarted(ctx) }

func restartedRecompute(ctx context.Context, t *trial) error {
	if t.recompute == nil {
		return errNotAsked
	}
	t.decode = t.recompute
	return t.restarted(ctx)
}

// restarted uses one handle as soon as the prefill server is gone, and another one when it is back.
func (t *trial) restarted(ctx context.Context) error {
	if t.restart == nil {
		return errNotAsked
	}
	// The two servers know each other.
	q := t.completion(promptTokens)
	if r, err := t.prefill.ask(ctx, q.forPrefill()); err != nil {
		return err
	} else if _, err := t.decode.ask(ctx, q.forDecode(r.handle)); err != nil {
		return err
	}
	early, late := t.completion(promptTokens), t.completion(promptTokens)
	one, err := t.claim(ctx, early)
	if err != nil {
		return err
	}
	two, err := t.prefill.ask(ctx, late.forPrefill())
	if err != nil {
		return err
	}
	before, err := t.decode.read(ctx)
	if err != nil {
		return err
	}
	if err := t.restart(ctx); err != nil {
		return err
	}
	_, err = t.decoded(ctx, "decode at once", early, one)
	if err != nil {
		return err
	}
	if !poll(ctx, startLimit, func() bool { return t.prefill.healthy(ctx) }) {
		return errors.New("the prefill server did not come back")
	}
	if _, err := t.decoded(ctx, "decode when it is back", late, two); err != nil {
		return err
	}
	fresh := t.completion(promptTokens)
	three, err := t.prefill.ask(ctx, fresh.forPrefill())
	if err != nil {
		return err
	}
	if _, err := t.decoded(ctx, "decode with a new handle", fresh, three); err != nil {
		return err
	}
	_, after, err := t.settle(ctx)
	if err != nil {
		return err
	}
	t.count("failed transfers", after.failed-before.failed)
	return nil
}

// noBlockIDs sends what ends a decode server's process.
func noBlockIDs(ctx context.Context, t *trial) error {
	if !t.deadly {
		return errNotAsked
	}
	handle := []byte(`{"do_remote_prefill":true}`)
	_, err := t.decode.ask(ctx, t.completion(promptTokens).forDecode(handle))
	gone := func() bool {
		resp, err := t.decode.do(ctx, http.MethodGet, "/health", nil)
		if err == nil {
			resp.Body.Close()
		}
		return errors.Is(err, syscall.ECONNREFUSED)
	}
	switch {
	case poll(ctx, answerLimit, gone):
		t.add("decode server", "its process ended")
	case err != nil:
		return err
	default:
		t.add("decode server", "lives")
	}
	return nil
}
