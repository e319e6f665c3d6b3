// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Limits of every wait.
const (
	defaultLease = 30 * time.Second // vLLM's own
	pollInterval = 20 * time.Millisecond
	scrapeLimit  = 10 * time.Second
	answerLimit  = time.Minute
	startLimit   = 5 * time.Minute
	margin       = 15 * time.Second // of a wait for the end of a lease
)

// lab is a pair of model servers under observation.
type lab struct {
	prefill   *server
	decode    *server
	recompute *server // a decode server with the other load failure policy; nil for none
	model     string
	restart   func(ctx context.Context) error // ends the prefill server and has it started again; nil for none
	lease     time.Duration                   // of finished prefills, on the prefill server
	soon      time.Duration                   // within which blocks of a cancelled prefill are to be free
	deadly    bool                            // run what ends a server's process

	baton *baton // nil until a scenario needs it
}

func (l *lab) close() error {
	if l.baton == nil {
		return nil
	}
	return l.baton.close()
}

// scenario is one use or misuse.
type scenario struct {
	key, title string
	counts     string // which counters make facts: of blocks, pulled, late, failed
	run        func(ctx context.Context, t *trial) error
}

// trial is a scenario while it runs.
type trial struct {
	*lab
	facts  []fact
	decode *server // that is asked
	prompt int     // tokens of the prompt that was decoded
}

func (t *trial) add(name, is string) { t.facts = append(t.facts, fact{name, is}) }

// count adds what a counter should not have counted.
func (t *trial) count(name string, n float64) {
	if n != 0 {
		t.add(name, strconv.FormatFloat(n, 'f', -1, 64))
	}
}

var errNotAsked = errors.New("not run")

// run runs one scenario between two readings of the servers. What keeps it from being run stands in the row.
func (l *lab) run(ctx context.Context, s scenario) row {
	start := time.Now()
	t := &trial{lab: l, decode: l.decode}
	if err := t.between(ctx, s); err != nil {
		t.facts = append(t.facts, fact{"error", err.Error()})
		if errors.Is(err, errNotAsked) {
			t.facts = nil
		}
	}
	return row{Key: s.key, Scenario: s.title, Facts: t.facts, Took: time.Since(start).Round(time.Millisecond)}
}

func (t *trial) between(ctx context.Context, s scenario) error {
	prefill, decode, err := t.settle(ctx)
	if err != nil {
		return fmt.Errorf("before: %w", err)
	}
	if err := s.run(ctx, t); err != nil || s.counts == "" {
		return err
	}
	prefillAfter, decodeAfter, err := t.settle(ctx)
	if err != nil {
		return fmt.Errorf("after: %w", err)
	}
	for name := range strings.FieldsSeq(s.counts) {
		switch name {
		case "blocks":
			t.add("blocks", blocks(prefillAfter.expired-prefill.expired))
		case "pulled":
			t.add("pulled", share(decodeAfter.pulled-decode.pulled, t.prompt))
		case "late":
			t.count("late notifications", prefillAfter.late-prefill.late)
		case "failed":
			t.count("failed transfers", decodeAfter.failed-decode.failed)
		}
	}
	return nil
}

// settle waits until neither server has anything left, which may take a lease, and reads both.
func (t *trial) settle(ctx context.Context) (prefill, decode *reading, err error) {
	out := [2]*reading{}
	for i, s := range []*server{t.prefill, t.decode} {
		if err := t.quiet(ctx, s); err != nil {
			return nil, nil, err
		}
		// Counters are passed on with the steps of the engine: let it make some.
		for range 2 {
			if _, err := s.ask(ctx, t.completion(8).with("max_tokens", 2)); err != nil {
				return nil, nil, err
			}
		}
		if err := t.quiet(ctx, s); err != nil {
			return nil, nil, err
		}
		if out[i], err = s.read(ctx); err != nil {
			return nil, nil, err
		}
	}
	return out[0], out[1], nil
}

func (l *lab) quiet(ctx context.Context, s *server) error {
	var last reading
	var err error
	limit := l.lease + margin
	ok := poll(ctx, limit, func() bool {
		var r *reading
		if r, err = s.read(ctx); err == nil {
			last = *r
		}
		return err == nil && last.quiet()
	})
	if !ok {
		return errors.Join(fmt.Errorf("%s not idle after %v: %+v", s.url, limit, last), err)
	}
	return nil
}

func blocks(expired float64) string {
	switch expired {
	case 0:
		return "free"
	case 1:
		return "of one prefill held until the lease ended"
	}
	return fmt.Sprintf("of %v prefills held until the lease ended", expired)
}

func share(pulled float64, prompt int) string {
	switch {
	case pulled == 0:
		return "nothing"
	case pulled == float64(prompt):
		return "the whole prompt"
	case pulled > float64(prompt):
		return "more than the prompt" // several answers pull for themselves what they do not find in the cache by then
	}
	return fmt.Sprintf("%v tokens of %d", pulled, prompt)
}
