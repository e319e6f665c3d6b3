// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// errAborted is the cause of a request's end by /abort_request. Its client is answered.
var errAborted = errors.New("aborted by request id")

const finishAbort = "abort"

// flights are the requests that run, for /abort_request. Safe for concurrent use.
type flights struct {
	mu      sync.Mutex
	running map[*flight]struct{}
}

// flight is one request.
type flight struct {
	rids  []string // of each sequence
	abort context.CancelCauseFunc
}

// track lets /abort_request find c. ctx is what the request runs under until end.
func (f *flights) track(parent context.Context, c *call) (ctx context.Context, end func()) {
	ctx, cancel := context.WithCancelCause(parent)
	one := &flight{rids: append(slices.Clone(c.rids), c.id), abort: cancel}
	f.mu.Lock()
	f.running[one] = struct{}{}
	f.mu.Unlock()
	return ctx, func() {
		f.mu.Lock()
		delete(f.running, one)
		f.mu.Unlock()
		cancel(nil)
	}
}

// abortPrefix ends every request that has a request id with that prefix; a batch ends as a whole.
func (f *flights) abortPrefix(prefix string, all bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for one := range f.running {
		if all || slices.ContainsFunc(one.rids, func(rid string) bool { return strings.HasPrefix(rid, prefix) }) {
			one.abort(errAborted)
		}
	}
}

// serveAbort is POST /abort_request. It answers 200 whether or not a request matches.
func (p *process) serveAbort(x *exchange) {
	body, ok := x.readBody()
	if !ok {
		return
	}
	f, bad := readObject(body)
	if bad != nil {
		x.fail(bad)
		return
	}
	rid, all := f.text("rid"), f.boolean("abort_all")
	if f.err != nil {
		x.fail(f.err)
		return
	}
	if _, given := f.raw("rid"); given || all { // a rid of "" is a prefix of every other
		sglangOf(p).flights.abortPrefix(rid, all)
	}
	p.serveHealth(x)
}

// readRequestIDs reads rid: one text, from which those of a batch are made, or a list.
func (c *call) readRequestIDs(f *fields) {
	list := f.texts("rid")
	n := len(c.prompts) * c.n
	switch {
	case len(list) == n && n > 0:
		c.id, c.rids = list[0], list
	case len(list) == 1:
		c.id = list[0]
		for i := range n {
			c.rids = append(c.rids, c.id+"_"+strconv.Itoa(i))
		}
	case len(list) > 0 && f.err == nil:
		f.err = badRequest("", "The rids length mismatch with the batch_size.")
	}
}

// answerAborted answers a request that /abort_request ended, with what it has so far.
func (p *process) answerAborted(x *exchange, out *writer) {
	for _, q := range out.g.seqs {
		if q.finish != "" {
			continue
		}
		q.finish, q.stopReason = finishAbort, ""
		if x.call.stream {
			out.closeChoice(q)
		}
	}
	if x.call.stream {
		out.end()
		return
	}
	x.json(http.StatusOK, out.whole(nil))
}

// closeChoice sends an event without text that carries an answer's finish reason.
func (w *writer) closeChoice(q *sequence) {
	switch w.c.api {
	case apiCompletions, apiChat:
		_ = w.sse.data(marshal(w.tokenChunk(q, 0, "")))
	case apiNative:
		_ = w.sse.data(marshal(w.nativeAnswer(q)))
	case apiResponses, apiMessages, apiGenerate: // the end says it
	}
}

// aborted reports whether /abort_request ended a request.
func aborted(ctx context.Context) bool { return errors.Is(context.Cause(ctx), errAborted) }
