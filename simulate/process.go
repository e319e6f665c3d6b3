// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"syscall"
	"time"
)

// process is one run of an engine's server, from a start to a kill: what a restarted pod loses.
type process struct {
	// Immutable after newProcess.
	e       *Engine
	id      string // engine UUID
	addr    netip.AddrPort
	started time.Time
	srv     *http.Server
	cancel  context.CancelFunc // ends every request's context

	serving sync.WaitGroup // the accept loop
	conns   sync.WaitGroup // open connections, each with its goroutine
	work    sync.WaitGroup // handlers

	connMu   sync.Mutex // guards what follows
	open     map[net.Conn]struct{}
	listener net.Listener // nil while the engine refuses connections
	stopped  bool

	mu sync.Mutex // guards what follows: the virtual accelerator
	scheduler
}

type connKey struct{}

func newProcess(e *Engine, addr netip.AddrPort) *process {
	base, cancel := context.WithCancel(context.Background())
	p := &process{
		e: e, id: e.uuid(), addr: addr, started: time.Now(), cancel: cancel,
		open: map[net.Conn]struct{}{},
	}
	p.init(&e.opts)
	p.srv = &http.Server{
		Handler:           http.HandlerFunc(p.serveHTTP),
		IdleTimeout:       e.timing.keepAlive,
		ReadHeaderTimeout: 0, // uvicorn keeps a connection that never sent a byte
		MaxHeaderBytes:    1 << 20,
		BaseContext:       func(net.Listener) context.Context { return base },
		ConnContext:       func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
		ConnState:         p.connState,
		ErrorLog:          slog.NewLogLogger(slog.DiscardHandler, slog.LevelError), // aborted requests are our own doing
	}
	return p
}

// listen binds addr, waiting shortly for a port that an ended connection still holds.
func listen(addr string) (net.Listener, error) {
	deadline := time.Now().Add(3 * time.Second)
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		var lc net.ListenConfig
		ln, err := lc.Listen(ctx, "tcp", addr)
		if err == nil {
			return ln, nil
		}
		if !isAddrInUse(err) || !time.Now().Before(deadline) {
			return nil, fmt.Errorf("listen: %w", err)
		}
		<-tick.C
	}
}

func isAddrInUse(err error) bool { return errors.Is(err, syscall.EADDRINUSE) }

func (p *process) serve(ln net.Listener) {
	p.connMu.Lock()
	p.listener = ln
	p.connMu.Unlock()
	p.serving.Go(func() {
		if err := p.srv.Serve(ln); err != nil && !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			p.e.log.Error("serve", slog.Any("err", err))
		}
	})
}

// connState keeps the set of open connections, so that a kill can reset them.
func (p *process) connState(c net.Conn, s http.ConnState) {
	switch s {
	case http.StateNew:
		p.conns.Add(1)
		p.connMu.Lock()
		p.open[c] = struct{}{}
		if p.stopped { // accepted while the port was closing
			reset(c)
		}
		p.connMu.Unlock()
	case http.StateClosed, http.StateHijacked:
		p.connMu.Lock()
		delete(p.open, c)
		p.connMu.Unlock()
		p.conns.Done()
	case http.StateActive, http.StateIdle:
	}
}

// stop resets every connection but own, closes the port and cancels all requests. It does not wait.
func (p *process) stop(own net.Conn) {
	p.connMu.Lock()
	p.stopped = true
	if p.listener != nil {
		_ = p.listener.Close() // its only error is that it is closed
		p.listener = nil
	}
	for c := range p.open {
		if c != own {
			reset(c)
		}
	}
	p.connMu.Unlock()
	if own == nil {
		_ = p.srv.Close() // its only error is the listener's, which is gone either way
	}
	p.cancel()
	p.mu.Lock()
	p.stopLeasesLocked()
	p.mu.Unlock()
}

// wait returns when the process has no goroutine left.
func (p *process) wait() {
	_ = p.srv.Close() // a process that died by itself has closed only its listener
	p.serving.Wait()
	p.conns.Wait()
	p.work.Wait()
}

// refuse closes the listener, or opens it again on the same address.
func (p *process) refuse(on bool) error {
	p.connMu.Lock()
	defer p.connMu.Unlock()
	switch {
	case p.stopped:
		return nil
	case on && p.listener != nil:
		err := p.listener.Close()
		p.listener = nil
		p.srv.SetKeepAlivesEnabled(false) // closes idle connections, so that pooled ones do not hide the fault
		if err != nil {
			return fmt.Errorf("refuse: %w", err)
		}
	case !on && p.listener == nil:
		ln, err := listen(p.addr.String())
		if err != nil {
			return err
		}
		p.srv.SetKeepAlivesEnabled(true)
		p.listener = ln
		p.serving.Go(func() { _ = p.srv.Serve(ln) })
	}
	return nil
}

// reset closes c so that its peer sees a TCP reset.
func reset(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetLinger(0) // fails only on a connection that is closed already
	}
	_ = c.Close() // as above
}
