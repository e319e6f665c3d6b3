// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptrace"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/sidecar/connectors"
)

// rejectedFor is how long a decode that would wait in vain is left alone after its prefill was rejected: it is about to
// reject the request, too, and its words are for the client.
const rejectedFor = time.Second

// leg is a prefill that runs beside decode, on wires whose engines meet while both run. Its goroutine never touches job
// or outcome, which belong to the stream's: what it came to waits in result and record. It holds its endpoint's slot and
// load until its end, and outlives the stream's context: cancel, its limits and Orchestrator.Close end it.
type leg struct {
	*attempt
	job    Job // the request as post needs it, without the client's body
	given  connectors.Exchange
	load   *pool.Reservation
	cancel context.CancelCauseFunc
	onWay  func()        // closes sent, once
	sent   chan struct{} // closed: the request is on its way
	done   chan struct{} // closed last of all

	// Set before done is closed.
	result   result
	record   Attempt
	panicked error // of a connector

	aborted sync.Once

	mu    sync.Mutex
	over  bool     // guarded by mu
	after []func() // guarded by mu; see then
}

// launch starts a prefill at e that is to run while decode does, and waits until its request is on its way. One that ends
// badly before that is no leg: it is a failed attempt, over when launch returns.
func (r *run) launch(ctx context.Context, e *pool.Endpoint, uncached int64) (*leg, result) {
	l := &leg{attempt: r.newAttempt(e, uncached), load: r.load, sent: make(chan struct{}), done: make(chan struct{})}
	l.beside = true
	l.onWay = sync.OnceFunc(func() { close(l.sent) })
	r.load = nil

	own, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	l.cancel = cancel
	limited, stop := context.WithTimeoutCause(own, r.s.Prefill.Timeout, errPhaseTimeout)
	limited, stopBudget := context.WithDeadlineCause(limited, r.deadline, ErrBudgetSpent)
	closed := context.AfterFunc(r.o.closing, func() { cancel(context.Canceled) }) //nolint:contextcheck // ends with the orchestrator
	r.o.background.Go(func() {
		defer func() { closed(); stopBudget(); stop(); cancel(nil) }()
		l.run(limited, r)
	})
	select {
	case <-l.sent:
	case <-l.done:
	case <-ctx.Done():
		cancel(context.Cause(ctx))
		<-l.done
	}
	if l.ended() && l.panicked != nil {
		panic(l.panicked) //nolint:forbidigo // of a connector: for who guards the stream's goroutine
	}
	if l.ended() && !l.result.served() {
		r.out.Attempts = append(r.out.Attempts, l.record)
		return nil, l.result
	}
	return l, result{}
}

// run is the leg's goroutine. r may be read only until the request is on its way, for which launch waits.
func (l *leg) run(ctx context.Context, r *run) {
	l.guarded(ctx, r)
	l.record = l.close(&l.result)
	l.load.Release()
	if l.result.served() {
		l.o.metrics.checkpoints.WithLabelValues(PrefillComplete.String()).Inc()
		trace.SpanFromContext(ctx).AddEvent(PrefillComplete.String())
	}
	l.leaveWord(ctx)
	l.mu.Lock()
	l.over = true
	after := l.after
	l.after = nil
	l.mu.Unlock()
	for _, f := range after {
		f()
	}
	close(l.done)
}

// leaveWord lets decode answer a request that prefill has rejected. The books of the phase are open until then.
func (l *leg) leaveWord(ctx context.Context) {
	select {
	case <-l.sent:
	default:
		return // decode does not have it
	}
	if l.result.reason != reasonRejected || !l.wire.EndsDecode {
		return
	}
	timer := time.NewTimer(rejectedFor)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// guarded keeps a panic for the stream's goroutine; here it would end the process.
func (l *leg) guarded(ctx context.Context, r *run) {
	defer func() {
		if p := recover(); p != nil {
			l.panicked = fmt.Errorf("prefill: %v\n%s", p, debug.Stack())
			l.o.log.Error("panic in a prefill beside decode", slog.Any("err", l.panicked))
			l.result = result{reason: reasonMalformed, err: l.panicked}
		}
	}()
	l.result = l.do(ctx, func(ctx context.Context) *http.Request { return l.request(ctx, r) })
}

// request makes the prefill's request. From then on the leg has a request of its own, since the director drops the
// client's bytes from the job's while the leg runs.
func (l *leg) request(ctx context.Context, r *run) *http.Request {
	own := *r.j.Request
	l.x.Request = &own
	edits := r.prefillBody(l.x)
	body := newPassing(edits)
	l.given = *l.x
	l.given.Request = r.j.Request
	own.Body = inference.Body{}
	l.job = Job{Request: &own}
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		// A body that takes longer than a connection may take is on its way: decode need not wait for all of it.
		GotConn: func(httptrace.GotConnInfo) { time.AfterFunc(l.s.Prefill.ConnectTimeout, l.onWay) },
		WroteRequest: func(info httptrace.WroteRequestInfo) {
			if info.Err == nil {
				l.onWay()
			}
		},
	})
	return l.o.post(ctx, l.s, &l.job, l.e, call{path: enginePath(own.API), id: own.ID, body: body, attempt: l.number})
}

// ended reports whether the leg is over.
func (l *leg) ended() bool {
	select {
	case <-l.done:
		return true
	default:
		return false
	}
}

// then has f called when the leg is over, by its goroutine, or now where it is over already. f must not wait.
func (l *leg) then(f func()) {
	l.mu.Lock()
	if !l.over {
		l.after = append(l.after, f)
		l.mu.Unlock()
		return
	}
	l.mu.Unlock()
	f()
}

// served reports whether the prefill endpoint did its part and has the blocks. On a wire whose decode does not wait for
// the answer, an answer that cannot be used is one, too.
func (r *result) served() bool {
	switch r.reason {
	case reasonOK, reasonMissing, reasonIncomplete, reasonTooLarge:
		return true
	default:
		return false
	}
}

// passing is a body that is kept only as long as it may be sent anew.
type passing struct {
	size  int
	edits atomic.Pointer[inference.Edits]
}

func newPassing(edits *inference.Edits) *passing {
	p := &passing{size: edits.Len()}
	p.edits.Store(edits)
	time.AfterFunc(2*replayWithin, func() { p.edits.Store(nil) })
	return p
}

// Len is the number of bytes.
func (p *passing) Len() int { return p.size }

// Reader reads the body, or fails when it was dropped.
func (p *passing) Reader() io.ReadCloser {
	if edits := p.edits.Load(); edits != nil {
		return edits.Reader()
	}
	return io.NopCloser(dropped{})
}

type dropped struct{}

// Read says that the body was dropped.
func (dropped) Read([]byte) (int, error) { return 0, errReplayed }
