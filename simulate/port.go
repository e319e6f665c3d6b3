// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"
	"time"
)

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

// reservation keeps a port that refuses for its engine: a socket that is bound and does not listen. Without it another
// server, or the near end of any connection, may be given the port, and whoever takes the engine for dead hears a
// stranger.
type reservation struct{ fd int }

// closing is how long reserve waits for a listener's end.
const closing = 200 * time.Millisecond

// reserve keeps addr, as far as it can: a port that is taken already stays so.
func reserve(addr netip.AddrPort) (reservation, bool) {
	family, at := syscall.AF_INET6, syscall.Sockaddr(&syscall.SockaddrInet6{Port: int(addr.Port()), Addr: addr.Addr().As16()})
	if ip := addr.Addr().Unmap(); ip.Is4() {
		family, at = syscall.AF_INET, &syscall.SockaddrInet4{Port: int(addr.Port()), Addr: ip.As4()}
	}
	syscall.ForkLock.RLock() // no child process may inherit it
	fd, err := syscall.Socket(family, syscall.SOCK_STREAM, 0)
	if err == nil {
		syscall.CloseOnExec(fd)
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return reservation{}, false
	}
	// Lets listen bind the port beside us, and us beside connections that are not quite over.
	err = syscall.SetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1)
	if err == nil {
		err = syscall.Bind(fd, at)
	}
	// The listener may be there for a moment more: its Accept has not returned, or a child process has it until it starts.
	for end := time.Now().Add(closing); isAddrInUse(err) && time.Now().Before(end); err = syscall.Bind(fd, at) {
		<-time.After(time.Millisecond)
	}
	if err != nil {
		_ = syscall.Close(fd) // nothing was written
		return reservation{}, false
	}
	return reservation{fd}, true
}

func (r reservation) release() { _ = syscall.Close(r.fd) } // nothing was written

// reserve keeps the ports until the engine listens there again or is closed.
func (e *Engine) reserve(ports ...netip.AddrPort) {
	for _, at := range ports {
		if r, ok := reserve(at); ok {
			e.mu.Lock()
			e.reserved = append(e.reserved, r)
			e.mu.Unlock()
		}
	}
}

func (e *Engine) release() {
	e.mu.Lock()
	defer e.mu.Unlock()
	for _, r := range e.reserved {
		r.release()
	}
	e.reserved = nil
}
