// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"runtime/debug"
	"strings"
	"time"

	"github.com/baton-epp/baton/pool"
	"github.com/baton-epp/baton/sidecar/connectors"
)

const (
	// introductionTimeout bounds the question to a prefill endpoint that is asked before its first prefill.
	introductionTimeout = 5 * time.Second
	// maxIntroduction bounds the answer, in bytes.
	maxIntroduction = 64 << 10
)

// introduction is the question to one prefill endpoint, which all requests that need its answer share.
type introduction struct {
	done   chan struct{} // closed when the answer is there
	facts  []byte        // set before done is closed; nil when failed is
	failed *result       // likewise
}

// introduce lets the endpoint say what the wire has to know before a first prefill there. A result is a failed attempt.
func (a *attempt) introduce(ctx context.Context) *result {
	wire, ok := a.wire.Connector.(connectors.Introducer)
	if !ok {
		return nil
	}
	port, path := wire.Introduce(a.x) // first, since a panic below would leave others waiting
	known, first := a.o.peers.introduction(a.e)
	if first {
		// Others may be waiting for the same answer: it must not end with this request.
		detached := context.WithoutCancel(ctx)
		a.o.background.Go(func() { a.o.inquire(detached, known, a.e, port, path, wire) })
	}
	select {
	case <-known.done:
	case <-ctx.Done():
		return &result{reason: reasonOfEnd(context.Cause(ctx), reasonTimeout), err: context.Cause(ctx)}
	}
	a.x.Facts = known.facts
	return known.failed
}

// inquire sends the question and keeps the answer, unless it is a failure.
func (o *Orchestrator) inquire(ctx context.Context, in *introduction, e *pool.Endpoint, port uint16, path string, wire connectors.Introducer) {
	defer close(in.done)
	ctx, cancel := context.WithTimeoutCause(ctx, introductionTimeout, errPhaseTimeout)
	defer cancel()
	defer context.AfterFunc(o.closing, cancel)() //nolint:contextcheck // ends with the orchestrator
	defer func() {
		if p := recover(); p != nil { // of a connector: it would end the process
			in.failed = &result{reason: reasonMalformed, err: fmt.Errorf("introduction: %v", p)}
			o.log.Error("panic in an introduction", slog.Any("err", p), slog.String("stack", string(debug.Stack())))
			o.peers.forget(e)
		}
	}()
	in.facts, in.failed = o.facts(ctx, e, port, path, wire)
	if in.failed != nil {
		o.peers.forget(e)
		in.failed.err = fmt.Errorf("introduction at %s: %w", netip.AddrPortFrom(e.Addr.Addr(), port), cmp.Or(in.failed.err, statusError(in.failed.status)))
	}
	if o.peers.introduced(e, in.failed == nil) && in.failed.reason != reasonCanceled {
		o.log.Info("a prefill endpoint does not introduce itself: its prefills fail until it does",
			slog.String("endpoint", e.Hostport), slog.String("reason", in.failed.reason), slog.Any("err", in.failed.err))
	}
}

// facts asks e. The bootstrap servers of engines speak plain HTTP whatever the engines themselves speak.
func (o *Orchestrator) facts(ctx context.Context, e *pool.Endpoint, port uint16, path string, wire connectors.Introducer) ([]byte, *result) {
	addr := netip.AddrPortFrom(e.Addr.Addr(), port)
	path, query, _ := strings.Cut(path, "?")
	req := &http.Request{
		Method: http.MethodGet, URL: &url.URL{Scheme: "http", Host: addr.String(), Path: path, RawQuery: query}, Host: addr.String(),
		Header: http.Header{"Accept": {"application/json"}, "Accept-Encoding": {"identity"}, "User-Agent": {"baton"}, "X-Baton-Depth": {"1"}},
		Close:  true, // it is asked once
	}
	ctx = context.WithValue(ctx, sideDoor{}, sideDoor{owner: keyOf(e), addr: addr})
	resp, err := o.settings.Load().transport.RoundTrip(req.WithContext(ctx))
	if err != nil {
		return nil, &result{reason: reasonOfFailure(ctx, err), err: err}
	}
	defer resp.Body.Close()
	if reason := reasonOfStatus(resp.StatusCode); reason != reasonOK {
		if reason == reasonRejected {
			reason = reasonMalformed // nothing of the client's was in it
		}
		return nil, &result{reason: reason, status: resp.StatusCode}
	}
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxIntroduction+1))
	switch {
	case err != nil:
		return nil, &result{reason: reasonOfFailure(ctx, err), status: resp.StatusCode, err: err}
	case len(text) > maxIntroduction:
		return nil, &result{reason: reasonMalformed, status: resp.StatusCode, err: errIntroduction}
	}
	if err := wire.Introduced(text); err != nil {
		return nil, &result{reason: reasonMalformed, status: resp.StatusCode, err: err}
	}
	return bytes.Clone(text), nil
}

// statusError is an answer that is no 200.
func statusError(status int) error { return fmt.Errorf("status %d", status) }

// sideDoor is the one address beside the pool's own that a request may dial: another port of an endpoint in the pool.
// Its zero value is the key of the context value.
type sideDoor struct {
	owner peerKey
	addr  netip.AddrPort
}

// permitted reports whether a sub-request may dial an address now.
func (o *Orchestrator) permitted(ctx context.Context, addr netip.AddrPort) bool {
	s := o.snapshot()
	if s.ByAddr(addr) != nil {
		return true
	}
	door, ok := ctx.Value(sideDoor{}).(sideDoor)
	return ok && door.addr == addr && door.owner.addr.Addr() == addr.Addr() && door.owner.alive(s)
}

// introduction returns what e said or is about to say; first is true for whoever has to ask.
func (p *peers) introduction(e *pool.Endpoint) (in *introduction, first bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	known := p.peerLocked(keyOf(e))
	if known.introduction == nil {
		known.introduction, first = &introduction{done: make(chan struct{})}, true
	}
	return known.introduction, first
}

// introduced notes how an introduction ended; true for the first failure in a row.
func (p *peers) introduced(e *pool.Endpoint, ok bool) (failed bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	known := p.peerLocked(keyOf(e))
	failed = !ok && !known.silent
	known.silent = !ok
	return failed
}

// forget drops what e said of itself: it may be another process now.
func (p *peers) forget(e *pool.Endpoint) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if known := p.byKey[keyOf(e)]; known != nil {
		known.introduction = nil
	}
}
