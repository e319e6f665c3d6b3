// SPDX-License-Identifier: Apache-2.0

// Package simulate is a pool of simulated model servers: real HTTP/1.1 servers that speak the wire of vLLM 0.32
// (completions, chat, responses, messages, streaming, errors, /metrics, NIXL handles with leases, the other connectors
// of [Options.Connector]), of SGLang or of TensorRT-LLM ([Options.Engine]) on a virtual accelerator with a block pool, a
// prefix cache, a queue and a timing model for each data-parallel rank. vLLM's NIXL pull is held to a recorded server;
// the others follow the engines' sources as read, not a run. They answer as the real server does when it is misused,
// they can be told to fail ([Faults]), they publish what their prefix caches hold ([KVEvents]), and they account for
// every KV block ([Engine.Held], [Engine.Leaked], [Engine.Pulls]). The one type is [Engine]; a [Pool] is many of them in
// one process.
//
// Every duration passes through [Options.Scale]: with 0.01 a 30 s lease ends after 0.3 s.
package simulate

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"time"
)

// ErrRunning is returned by Start and Restart of an engine that already runs.
var ErrRunning = errors.New("engine is running")

// Engine is one simulated model server. Make it with [New]. All methods are safe for concurrent use.
type Engine struct {
	// Immutable after New.
	opts     Options
	timing   timing
	log      *slog.Logger
	registry *Registry
	sidePort int // the NIXL side-channel port that handles carry; 5600 plus the ranks before it in the registry

	records records // has its own lock
	faults  faultState

	control sync.Mutex // serializes Start, Kill, Restart and Close, and guards what follows
	closed  bool
	revival *time.Timer // of a kill by POST /admin/kill that is to be followed by a restart

	mu         sync.Mutex // guards what follows
	rng        *rand.Rand
	addr       netip.AddrPort // as bound first; kept over Kill and Restart
	sideAddr   netip.AddrPort // of the wire's own server, likewise; zero for none
	eventAddrs []eventAddrs   // of the ranks' KV events, likewise; nil for none
	current    *process       // nil before Start, after Kill and after Close
	last       *process       // the process whose goroutines Close and Restart wait for
	reserved   []reservation  // of ports on which the engine does not listen now
}

// New checks o and returns an engine. It starts nothing.
func New(o Options) (*Engine, error) {
	full, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	e := &Engine{
		opts:     full,
		timing:   full.timing(),
		log:      full.Logger.With(slog.String("component", "simulate"), slog.String("endpoint", full.Name)),
		registry: full.Peers,
		rng:      rand.New(rand.NewPCG(full.Seed, rand.Uint64())),
	}
	if full.Seed != 0 {
		e.rng = rand.New(rand.NewPCG(full.Seed, hashText(full.Name)))
	}
	if e.registry == nil {
		e.registry = NewRegistry()
	}
	e.records.limit(full.RecordBodies, full.RecordBytes)
	e.faults.set(full.Faults)
	e.sidePort = e.registry.add(e, full.Ranks)
	return e, nil
}

// Start listens and serves. The address is known when it returns.
func (e *Engine) Start() error {
	e.control.Lock()
	defer e.control.Unlock()
	return e.startLocked(e.opts.Addr)
}

// Restart starts the engine again on the port it had, with a new engine id and an empty cache, as a restarted pod has.
// It stops the engine first when it still runs.
func (e *Engine) Restart() error {
	e.control.Lock()
	defer e.control.Unlock()
	e.killLocked()
	return e.startLocked(e.Addr().String())
}

// Kill ends the process as SIGKILL does: connections are reset, the port refuses, caches and leases are gone.
func (e *Engine) Kill() {
	e.control.Lock()
	defer e.control.Unlock()
	e.killLocked()
}

// Close ends the engine for good and returns when its goroutines have ended.
func (e *Engine) Close() error {
	e.control.Lock()
	defer e.control.Unlock()
	e.closed = true
	e.killLocked()
	e.release()
	e.registry.remove(e)
	return nil
}

// reviveAfter restarts the engine after d, unless somebody else did or it was closed.
func (e *Engine) reviveAfter(d time.Duration) {
	e.control.Lock()
	defer e.control.Unlock()
	if e.closed {
		return
	}
	e.stopRevival()
	e.revival = time.AfterFunc(d, func() {
		e.control.Lock()
		defer e.control.Unlock()
		if e.closed || e.running() != nil {
			return
		}
		e.killLocked()
		if err := e.startLocked(e.Addr().String()); err != nil {
			e.log.Error("restart", slog.Any("err", err))
		}
	})
}

func (e *Engine) stopRevival() {
	if e.revival != nil {
		e.revival.Stop()
		e.revival = nil
	}
}

func (e *Engine) startLocked(addr string) error {
	if e.running() != nil {
		return ErrRunning
	}
	ln, err := listen(addr)
	if err != nil {
		return fmt.Errorf("engine %s: %w", e.opts.Name, err)
	}
	bound, err := netip.ParseAddrPort(ln.Addr().String())
	if err != nil {
		return errors.Join(fmt.Errorf("engine %s: %w", e.opts.Name, err), ln.Close())
	}
	p := newProcess(e, bound)
	if err := errors.Join(p.openSide(), p.openEvents()); err != nil {
		p.stop(nil)
		return errors.Join(fmt.Errorf("engine %s: %w", e.opts.Name, err), ln.Close())
	}
	e.release() // before anybody can end the process, which reserves the ports anew
	e.mu.Lock()
	e.addr = bound
	e.current, e.last = p, p
	e.mu.Unlock()
	p.serve(ln)
	e.log.Info("engine started", slog.String("addr", bound.String()), slog.String("engine_id", p.id))
	return nil
}

func (e *Engine) killLocked() {
	e.stopRevival()
	e.mu.Lock()
	p := e.last
	e.current, e.last = nil, nil
	e.mu.Unlock()
	if p == nil {
		return
	}
	p.stop(nil)
	p.wait()
}

// die ends the process from inside one of its own handlers, as a failed assertion in the engine core does: every other
// connection is reset, the port refuses, and nothing is waited for.
func (e *Engine) die(p *process, own net.Conn, requestID, reason string) {
	p = p.front
	p.stop(own)
	e.mu.Lock()
	if e.current == p {
		e.current = nil
	}
	e.mu.Unlock()
	e.records.death(Death{At: time.Now(), RequestID: requestID, Reason: reason})
	e.log.Info("engine died", slog.String("request_id", requestID), slog.String("reason", reason))
}

// running returns the process that serves now, nil when there is none.
func (e *Engine) running() *process {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.current
}

// Addr is the address that the engine serves on, or served on when it was killed; invalid before Start.
func (e *Engine) Addr() netip.AddrPort {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.addr
}

// BootstrapPort is the port of the connector's own HTTP server, such as Mooncake's bootstrap server; 0 where there is
// none or before Start.
func (e *Engine) BootstrapPort() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return int(e.sideAddr.Port())
}

// P2PPort is the port of the engine's KV side channel, at data-parallel rank 0: what handles and remote_port carry. No
// socket listens there: engines of one [Registry] reach each other by it.
func (e *Engine) P2PPort() int { return e.sidePort }

// URL is the engine's base URL, without a slash at the end.
func (e *Engine) URL() string { return "http://" + e.Addr().String() }

// Name is the engine's name; Role its informational role label.
func (e *Engine) Name() string { return e.opts.Name }

// Role is the engine's informational role: prefill, decode, prefill-decode or empty.
func (e *Engine) Role() string { return e.opts.Role }

// ID is the present process's engine id (a UUID, new with each start); empty when the engine is down.
func (e *Engine) ID() string {
	if p := e.running(); p != nil {
		return p.id
	}
	return ""
}

// Alive reports whether the engine's process runs: false after Kill, Close and a death of its own.
func (e *Engine) Alive() bool { return e.running() != nil }

// hex returns n random bytes as lower-case hexadecimal text.
func (e *Engine) hex(n int) string {
	const digits = "0123456789abcdef"
	out := make([]byte, 0, 2*n)
	e.mu.Lock()
	defer e.mu.Unlock()
	for range n {
		b := e.rng.Uint32()
		out = append(out, digits[b>>4&15], digits[b&15])
	}
	return string(out)
}

// chance draws true with probability p.
func (e *Engine) chance(p float64) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.rng.Float64() < p
}

func (e *Engine) uuid() string {
	h := e.hex(16)
	return h[:8] + "-" + h[8:12] + "-4" + h[13:16] + "-a" + h[17:20] + "-" + h[20:]
}

// remoteHost is what handles carry as remote_host.
func (e *Engine) remoteHost() string {
	if e.opts.RemoteHost != "" {
		return e.opts.RemoteHost
	}
	return e.Addr().Addr().String()
}
