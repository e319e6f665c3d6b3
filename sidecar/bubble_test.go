// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"context"
	"net"
	"net/http"
	"net/netip"
	"strconv"

	"github.com/baton-epp/baton/pool"
)

// bubble is a network of pipes, for tests in virtual time.
type bubble struct {
	r       *rig
	servers map[netip.AddrPort]pipeListener
}

// bubble replaces the rig's network.
func (r *rig) bubble() *bubble {
	b := &bubble{r: r, servers: make(map[netip.AddrPort]pipeListener)}
	r.settings.Load().transport.DialContext = func(ctx context.Context, _, address string) (net.Conn, error) {
		near, far := net.Pipe()
		select {
		case b.servers[netip.MustParseAddrPort(address)] <- far:
			return near, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return b
}

// server adds a prefill endpoint.
func (b *bubble) server(name string, h http.HandlerFunc) *pool.Endpoint {
	addr := netip.MustParseAddrPort("10.0.0." + strconv.Itoa(len(b.servers)+1) + ":8000")
	l := make(pipeListener)
	b.servers[addr] = l
	s := &http.Server{Handler: h}
	go func() { _ = s.Serve(l) }()
	b.r.t.Cleanup(func() { _ = s.Close() })
	return b.r.add(name, "prefill", addr.String())
}

// pipeListener hands out the far ends of pipes.
type pipeListener chan net.Conn

func (l pipeListener) Accept() (net.Conn, error) {
	c, ok := <-l
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}

func (l pipeListener) Close() error {
	close(l)
	return nil
}

func (l pipeListener) Addr() net.Addr { return &net.TCPAddr{} }
