// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/scheduler"
)

const (
	// encodeAttempts is how many encode attempts of one request are kept for its record.
	encodeAttempts = 64
	// itemBytes is what a request's encode legs may send beside their media, per item; see fanOut.bodies.
	itemBytes = 4 << 10
)

// errItemFailed ends the other items of a request that fails because of one.
var errItemFailed = errors.New("another item failed")

// itemFailure is how the last attempt at an item ended.
type itemFailure struct {
	result
	endpoint *pool.Endpoint // nil when none could be tried
	attempts int
}

// fanOut sends the items of one request, encode.parallel at a time. The run is read by all of its goroutines and changed
// by none of them.
type fanOut struct {
	*run
	enc   *encoding
	homes []home
	next  atomic.Int64 // the next item

	mu       sync.Mutex
	attempts []Attempt        // guarded by mu
	encoders []*pool.Endpoint // guarded by mu; one for each item encoded
	held     int64            // guarded by mu; bytes of handles
	failed   int              // guarded by mu
	failure  *itemFailure     // guarded by mu; the first one that ends the request
	panicked error            // guarded by mu
}

func newFanOut(r *run, enc *encoding, homes []home) *fanOut {
	return &fanOut{run: r, enc: enc, homes: homes}
}

// do encodes every item that can be, and returns when nothing of it runs any more.
func (f *fanOut) do(ctx context.Context) error {
	f.bodies()
	own, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	for range min(f.s.Encode.Parallel, len(f.enc.items)) {
		wg.Go(func() { f.work(own, cancel) })
	}
	wg.Wait()
	f.close()
	switch {
	case f.panicked != nil:
		panic(f.panicked) //nolint:forbidigo // of a connector: for who guards the stream's goroutine
	case f.failure != nil:
		return f.encodeFailed(f.failure)
	case ctx.Err() == nil:
		return nil
	case context.Cause(ctx) == ErrBudgetSpent: //nolint:errorlint // our own cause, never wrapped
		return fmt.Errorf("encode: %w", ErrBudgetSpent)
	default:
		return fmt.Errorf("encode: %w", context.Canceled)
	}
}

// bodies makes the bodies to be sent. What every item carries besides its media must not multiply the client's body: once
// all bodies together are twice as long, and 4 KiB an item, the rest is not sent.
func (f *fanOut) bodies() {
	req, enc := f.j.Request, f.enc
	left := 2*req.Body.Len + itemBytes*len(enc.items)
	for i := range enc.items {
		it := &enc.items[i]
		body, ok := enc.encoder.Item(&enc.x, it.media)
		if !ok || body.Len == 0 || body.Len > left {
			f.o.metrics.encodeItems.WithLabelValues(itemSkipped).Inc()
			continue
		}
		it.body = body
		left -= body.Len
	}
}

// work takes items until there are none.
func (f *fanOut) work(ctx context.Context, cancel context.CancelCauseFunc) {
	defer func() {
		if p := recover(); p != nil {
			f.mu.Lock()
			f.panicked = fmt.Errorf("encode: %v\n%s", p, debug.Stack())
			f.mu.Unlock()
			cancel(errItemFailed)
		}
	}()
	for ctx.Err() == nil {
		i := int(f.next.Add(1)) - 1
		if i >= len(f.enc.items) {
			return
		}
		if it := &f.enc.items[i]; it.body.Len > 0 {
			if last := f.item(ctx, i, it); last.reason != reasonOK && f.fail(last) {
				cancel(errItemFailed)
			}
		}
	}
}

// item tries the endpoints in the order of their weight for the item.
func (f *fanOut) item(ctx context.Context, i int, it *item) *itemFailure {
	last := &itemFailure{result: result{reason: reasonNoEncoder}}
	tried := make([]bool, len(f.homes))
	paid := true // the first attempt is no retry
	for last.attempts < f.s.Encode.Attempts {
		at := best(f.homes, it.hash, tried)
		if at < 0 {
			break
		}
		tried[at] = true
		now := time.Now()
		e := f.usableEncoder(f.homes[at].e, now)
		if e == nil || e.Health.Standing(now) == pool.Ejected && !f.homes[at].ejected {
			continue
		}
		if !paid && !f.retry() {
			break
		}
		paid = true
		if !f.admitEncoder(e, now) {
			continue
		}
		paid = false
		last.endpoint = e
		last.attempts++
		last.result = f.attempt(ctx, i, it, e, last.attempts)
		if last.reason == reasonOK || !sequelOf(last.reason).next {
			break
		}
	}
	return last
}

// admitEncoder takes the permits that e's breaker and its probation demand, right before it is asked.
func (f *fanOut) admitEncoder(e *pool.Endpoint, now time.Time) bool {
	return f.o.peers.allow(e, nil, now) && (e.Health.Standing(now) != pool.Probation || e.Health.TryProbe(now))
}

// attempt encodes an item at e, once. When it returns nothing of it runs any more.
func (f *fanOut) attempt(ctx context.Context, i int, it *item, e *pool.Endpoint, number int) result {
	start, phase := time.Now(), scheduler.PhaseEncode.String()
	load := e.Load.Reserve(0)
	f.o.metrics.inFlight.WithLabelValues(phase).Inc()
	own, cancel := context.WithTimeoutCause(ctx, f.s.Encode.Timeout, errPhaseTimeout)
	defer func() {
		cancel()
		f.o.metrics.inFlight.WithLabelValues(phase).Dec()
		load.Release()
	}()
	res := f.exchange(own, i, it, e, number)
	if res.reason == reasonOK && !f.keep(it, e, &res) {
		res.reason = reasonTooLarge
	}
	f.o.metrics.attempts.WithLabelValues(phase, res.reason).Inc()
	f.o.tell(e, res.reason)
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.attempts) < encodeAttempts {
		f.attempts = append(f.attempts, Attempt{
			Phase: scheduler.PhaseEncode, Endpoint: e, Number: number, Status: res.status, Reason: res.reason, Error: res.errorText(),
			Start: start, Duration: time.Since(start),
		})
	}
	return res
}

// exchange waits for a slot, sends an item and reads the answer.
func (f *fanOut) exchange(ctx context.Context, i int, it *item, e *pool.Endpoint, number int) result {
	slots, err := f.o.peers.slot(ctx, e, f.s.Prefill.MaxConcurrentPerEndpoint)
	if err != nil {
		return result{reason: reasonOfEnd(err, reasonSaturated), err: err}
	}
	defer func() { <-slots }()
	// A name of its own: engines name what they compute after the request, and two at once must not share it.
	id := f.j.Request.ID + "-enc-" + strconv.Itoa(i)
	c := call{path: enginePath(inference.Chat), id: id, body: parts{it.body}, attempt: number}
	return f.o.send(ctx, f.s, scheduler.PhaseEncode.String(), f.o.post(ctx, f.s, f.j, e, c), func(answer []byte, res *result) {
		res.answer = f.enc.encoder.Answer(&f.enc.x, it.media, answer)
		res.reason = reasonOfVerdict(res.answer.Verdict)
	})
}

// keep takes an item's handle; false when the request's handles together are larger than one answer may be.
func (f *fanOut) keep(it *item, e *pool.Endpoint, res *result) bool {
	size := int64(len(res.answer.Handle))
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.held+size > f.s.Prefill.MaxResponseBytes {
		return false
	}
	f.held += size
	f.o.metrics.heldBytes.Add(float64(size))
	it.handle, it.answered = res.answer.Handle, res.answered
	f.encoders = append(f.encoders, e)
	return true
}

// fail notes an item that was not encoded; true when the request ends with it.
func (f *fanOut) fail(last *itemFailure) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failed++
	if last.reason == reasonCanceled || last.reason == reasonBudget || f.encodeFailed(last) == nil {
		return false
	}
	if f.failure == nil {
		f.failure = last
	}
	return true
}

// close hands over to the run what came of the items.
func (f *fanOut) close() {
	m := f.o.metrics.encodeItems
	m.WithLabelValues(itemEncoded).Add(float64(len(f.encoders)))
	m.WithLabelValues(itemDeduplicated).Add(float64(f.enc.equal))
	m.WithLabelValues(itemSkipped).Add(float64(f.enc.skipped))
	m.WithLabelValues(itemFailed).Add(float64(f.failed))
	f.o.metrics.heldBytes.Sub(float64(f.held))
	for i := range f.enc.items {
		f.enc.items[i].body = inference.Body{} // the client's bytes, which are not to live as long as the response
	}
	for _, e := range f.encoders {
		f.out.addEncoder(e)
	}
	f.out.Attempts = append(f.out.Attempts, f.attempts...)
}
