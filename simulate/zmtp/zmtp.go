// SPDX-License-Identifier: Apache-2.0

// Package zmtp is the listening side of ZeroMQ's wire protocol, ZMTP 3.0 (rfc.zeromq.org/spec/23) with the NULL
// mechanism over TCP: [Pub], a PUB socket, and [Router], which answers requests as a ROUTER socket does. A simulated
// engine publishes its KV events on them. Peers are not trusted: whatever they make this side keep is bounded, one that
// is silent or slow holds up nobody else, and no goroutine outlives Close.
package zmtp

import (
	"errors"
	"net"
	"sync"
	"time"
)

// maxPeers bounds the connections of one socket.
const maxPeers = 256

// server accepts peers and serves each on a goroutine of its own.
type server struct {
	ln    net.Listener
	own   string        // socket type
	peers []string      // socket types that go with it
	wait  time.Duration // for a peer's handshake
	serve func(c *conn)
	done  chan struct{} // closed by Close
	work  sync.WaitGroup

	mu     sync.Mutex // guards what follows
	conns  map[net.Conn]struct{}
	closed bool
}

// start takes ln over.
func (s *server) start(ln net.Listener, own string, peers []string, wait time.Duration, serve func(c *conn)) {
	s.ln, s.own, s.peers, s.wait, s.serve = ln, own, peers, wait, serve
	s.done, s.conns = make(chan struct{}), map[net.Conn]struct{}{}
	s.work.Go(s.accept)
}

func (s *server) accept() {
	for {
		nc, err := s.ln.Accept()
		switch {
		case err == nil:
			s.admit(nc)
		case errors.Is(err, net.ErrClosed):
			return
		default: // out of file descriptors, or a peer that left in between
			select {
			case <-s.done:
				return
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
}

func (s *server) admit(nc net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || len(s.conns) >= maxPeers {
		_ = nc.Close() // nothing was said
		return
	}
	s.conns[nc] = struct{}{}
	s.work.Go(func() {
		defer s.leave(nc)
		if c, err := open(nc, s.own, s.peers, s.wait); err == nil { // who is no ZeroMQ peer is hung up on
			s.serve(c)
		}
	})
}

func (s *server) leave(nc net.Conn) {
	_ = nc.Close() // the peer is gone or to be gone
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, nc)
}

// Close closes the port and every connection, drops what is queued, and returns when no goroutine is left.
func (s *server) Close() {
	s.mu.Lock()
	if !s.closed {
		s.closed = true
		close(s.done)
		_ = s.ln.Close() // its only error is that it is closed
		for nc := range s.conns {
			_ = nc.Close() // as above
		}
	}
	s.mu.Unlock()
	s.work.Wait()
}

// Router answers requests, each to the peer that sent it: the ROUTER side of DEALER and REQ sockets.
type Router struct{ server }

// Reply sends one message to the peer whose request is being answered. It blocks while that peer does not read.
type Reply func(frames ...[]byte) error

// NewRouter serves on ln, which it takes over. answer is called with the frames of each request, one request of a peer at
// a time and peers beside each other; it must return when reply fails.
func NewRouter(ln net.Listener, answer func(request [][]byte, reply Reply)) *Router {
	r := &Router{}
	r.start(ln, "ROUTER", []string{"DEALER", "REQ", "ROUTER"}, handshakeWait, func(c *conn) {
		for {
			request, err := c.receive()
			if err != nil {
				return
			}
			answer(request, func(frames ...[]byte) error { return c.send(frames) })
		}
	})
	return r
}
