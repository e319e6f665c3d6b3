// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/internal/gatewaytest"
)

// compare runs the rounds.
func (o *orchestration) compare(ctx context.Context, r *orchestrated) error {
	with, err := o.picker(ctx, "orchestrate")
	if err != nil {
		return err
	}
	defer with.stop()
	without, err := o.picker(ctx, "off")
	if err != nil {
		return err
	}
	defer without.stop()
	// What any ext_proc server adds on this machine, and costs: one that picks at random and does nothing else.
	floor, err := o.suite.startBase(ctx, o.decoders)
	if err != nil {
		return err
	}
	defer floor.stop()
	hand := &byHand{o: o, up: &http.Transport{MaxIdleConnsPerHost: 256, DisableCompression: true}}
	for i := range o.rounds {
		o.suite.say("round %d of %d ...", i+1, o.rounds)
		byHand, err := o.paced(ctx, hand.do)
		if err != nil {
			return fmt.Errorf("by hand: %w", err)
		}
		orchestrated, cpu, err := o.through(ctx, with)
		if err != nil {
			return fmt.Errorf("with prefill: %w", err)
		}
		_, plain, err := o.through(ctx, without)
		if err != nil {
			return fmt.Errorf("without prefill: %w", err)
		}
		alone, err := o.paced(ctx, hand.decode)
		if err != nil {
			return fmt.Errorf("decode by hand: %w", err)
		}
		base, baseCPU, err := o.through(ctx, floor)
		if err != nil {
			return fmt.Errorf("floor: %w", err)
		}
		r.add(byHand, orchestrated, cpu, plain)
		r.addFloor(alone, base, baseCPU)
	}
	return nil
}

// through sends a part of a round through a picker, and measures its CPU per request.
func (o *orchestration) through(ctx context.Context, on *server) (times []time.Duration, cpu time.Duration, err error) {
	g, err := gatewaytest.New(gatewaytest.Options{Picker: on.addr, Request: gatewaytest.Duplex})
	if err != nil {
		return nil, 0, err
	}
	defer func() { _ = g.Close() }()
	before, err := cpuOf(on.pid())
	if err != nil {
		return nil, 0, err
	}
	times, err = o.paced(ctx, func(ctx context.Context, n int, body []byte) error {
		reply, err := g.Do(ctx, "/v1/chat/completions", body, "x-request-id", fmt.Sprintf("%s-%d-%d", on.label, time.Now().UnixNano(), n))
		switch {
		case err != nil:
			return err
		case reply.Status != http.StatusOK:
			return fmt.Errorf("status %d: %s", reply.Status, reply.Body)
		case on.label != labelFloor && reply.Header.Get("x-baton-outcome") != map[string]string{"orchestrate": "disaggregated", "off": "aggregated"}[on.label]:
			return fmt.Errorf("outcome %q", reply.Header.Get("x-baton-outcome"))
		}
		return nil
	})
	if err != nil {
		return nil, 0, err
	}
	after, err := cpuOf(on.pid())
	return times, (after - before) / time.Duration(max(1, len(times))), err
}

// paced sends requests evenly spaced and returns how long each took, in ascending order.
func (o *orchestration) paced(ctx context.Context, send func(ctx context.Context, n int, body []byte) error) ([]time.Duration, error) {
	var (
		mu       sync.Mutex
		times    []time.Duration
		firstErr error
		running  sync.WaitGroup
	)
	total := int(o.rate * o.round.Seconds())
	start := time.Now()
	for n := range total {
		if !wait(ctx, time.Until(start.Add(time.Duration(float64(n)/o.rate*float64(time.Second))))) {
			break
		}
		body := promptOf(n, o.body)
		running.Go(func() {
			began := time.Now()
			err := send(ctx, n, body)
			mu.Lock()
			defer mu.Unlock()
			times = append(times, time.Since(began))
			if firstErr == nil {
				firstErr = err
			}
		})
	}
	running.Wait()
	slices.Sort(times)
	return times, errors.Join(firstErr, ctx.Err())
}

// promptOf is a chat request with a prompt of size bytes of its own.
func promptOf(n, size int) []byte {
	text := prose(n, size)
	return fmt.Appendf(nil, `{"model":"tiny","max_tokens":1,"temperature":0,"messages":[{"role":"user","content":%q}]}`, text)
}

// byHand makes the two calls that Baton and the gateway make, and nothing else.
type byHand struct {
	o  *orchestration
	up *http.Transport
}

func (h *byHand) do(ctx context.Context, n int, body []byte) error {
	open := body[:len(body)-1]
	answer, err := h.post(ctx, h.o.prefillers[n%2], slices.Concat(open, []byte(`,"stream":false,"kv_transfer_params":{"do_remote_decode":true}}`)))
	if err != nil {
		return fmt.Errorf("prefill: %w", err)
	}
	handle, _, err := inference.Field(answer, "kv_transfer_params")
	if err != nil || len(handle) == 0 {
		return fmt.Errorf("prefill answered without a handle: %.200s", answer)
	}
	if _, err = h.post(ctx, h.o.decoders[n%2], slices.Concat(open, []byte(`,"kv_transfer_params":`), handle, []byte("}"))); err != nil {
		return fmt.Errorf("decode: %w", err)
	}
	return nil
}

// decode makes the decode call alone.
func (h *byHand) decode(ctx context.Context, n int, body []byte) error {
	_, err := h.post(ctx, h.o.decoders[n%2], body)
	return err
}

func (h *byHand) post(ctx context.Context, host string, body []byte) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+host+"/v1/chat/completions", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := h.up.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d: %.200s", resp.StatusCode, text)
	}
	return text, err
}
