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
	"sync/atomic"
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
	side    *http.Server       // the wire's own; nil for none
	cancel  context.CancelFunc // ends every request's context
	wire    wire               // nil for NIXL
	rank    int                // of front's data-parallel ranks
	front   *process           // the rank that serves for all; p itself where it is the only one
	ranks   []*process         // of a front, itself first
	gone    chan struct{}      // of a front, closed when it has ended
	turn    atomic.Uint32      // of ranks that are equally loaded

	serving sync.WaitGroup // the accept loop
	conns   sync.WaitGroup // open connections, each with its goroutine
	work    sync.WaitGroup // handlers

	connMu   sync.Mutex // guards what follows
	open     map[net.Conn]struct{}
	listener net.Listener // nil while the engine refuses connections
	stopped  bool
	served   bool // it listened: its ports are to be kept

	enc encoder // has its own lock

	mu sync.Mutex // guards what follows: the virtual accelerator
	scheduler
}

type connKey struct{}

func newProcess(e *Engine, addr netip.AddrPort) *process {
	base, cancel := context.WithCancel(context.Background())
	p := &process{
		e: e, id: e.uuid(), addr: addr, started: time.Now(), cancel: cancel,
		open: map[net.Conn]struct{}{}, gone: make(chan struct{}),
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
	p.addRanks()
	return p
}

// openSide starts the wire's own HTTP server, if it has one.
func (p *process) openSide() error {
	s, ok := p.wire.(sideServer)
	if !ok {
		return nil
	}
	port := p.e.sideAddr.Port() // kept over restarts
	if port == 0 {
		port = uint16(p.e.opts.SidePort) //nolint:gosec // checked
	}
	ln, err := listen(netip.AddrPortFrom(p.addr.Addr(), port).String())
	if err != nil {
		return fmt.Errorf("side server: %w", err)
	}
	p.e.mu.Lock()
	p.e.sideAddr, err = netip.ParseAddrPort(ln.Addr().String())
	p.e.mu.Unlock()
	p.side = &http.Server{
		Handler: s.sideHandler(), ReadHeaderTimeout: time.Minute, IdleTimeout: p.e.timing.keepAlive, MaxHeaderBytes: 1 << 16,
		BaseContext: p.srv.BaseContext, ConnState: p.connState, ErrorLog: p.srv.ErrorLog,
	}
	p.serving.Go(func() { _ = p.side.Serve(ln) }) // ends with the process
	return err
}

func (p *process) serve(ln net.Listener) {
	p.connMu.Lock()
	p.listener, p.served = ln, true
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

// stop resets every connection but own, closes the port and cancels all requests. It waits for nothing but the sockets of KV
// events.
func (p *process) stop(own net.Conn) {
	p.connMu.Lock()
	first := !p.stopped
	keep := first && p.served
	if first {
		close(p.gone)
	}
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
	if p.side != nil {
		_ = p.side.Close()
	}
	for _, q := range p.ranks {
		if q.events != nil {
			q.events.close()
		}
	}
	p.cancel()
	if keep {
		p.e.reserve(p.ports()...)
	}
	for _, q := range p.ranks {
		q.mu.Lock()
		q.stopLeasesLocked()
		q.enc.stopPins()
		q.mu.Unlock()
		if q.wire != nil {
			q.wire.stop()
		}
	}
}

// wait returns when the process has no goroutine left.
func (p *process) wait() {
	_ = p.srv.Close() // a process that died by itself has closed only its listener
	if p.side != nil {
		_ = p.side.Close()
	}
	p.serving.Wait()
	p.conns.Wait()
	p.work.Wait()
}

// ports are the addresses that the process listens on.
func (p *process) ports() []netip.AddrPort {
	ports := append(p.e.eventPorts(), p.addr)
	if p.side == nil {
		return ports
	}
	p.e.mu.Lock()
	defer p.e.mu.Unlock()
	return append(ports, p.e.sideAddr)
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
		p.e.reserve(p.addr)
	case !on && p.listener == nil:
		ln, err := listen(p.addr.String())
		if err != nil {
			return err
		}
		p.e.release()
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

// isGone reports whether the process has ended. Only of a front.
func (p *process) isGone() bool {
	select {
	case <-p.gone:
		return true
	default:
		return false
	}
}
