// SPDX-License-Identifier: Apache-2.0

package simulate

import (
	"errors"
	"net"
	"strconv"
	"syscall"
	"testing"
)

// TestPortIsKept: while an engine is dead or refuses, its port refuses, and nobody else is given it.
func TestPortIsKept(t *testing.T) {
	t.Parallel()
	e, err := New(Options{Connector: "mooncake"})
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = e.Close() })
	ports := []int{int(e.Addr().Port()), e.BootstrapPort()}
	// As the kernel does for a socket that asks for any port: without SO_REUSEADDR.
	alone := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var inner error
		return errors.Join(c.Control(func(fd uintptr) {
			inner = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 0)
		}), inner)
	}}
	check := func(when string, ports ...int) {
		t.Helper()
		for _, port := range ports {
			at := net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
			if c, err := net.Dial("tcp", at); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("%s: %s answers (%v, %v)", when, at, c, err)
			}
			ln, err := alone.Listen(t.Context(), "tcp", at)
			if err == nil {
				_ = ln.Close()
			}
			if !isAddrInUse(err) {
				t.Errorf("%s: somebody else is given %s: %v", when, at, err)
			}
		}
	}
	if err := e.SetFaults(Faults{Refuse: true}); err != nil {
		t.Fatal(err)
	}
	check("refusing", ports[0])
	if err := e.SetFaults(Faults{}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		e.Kill()
		check("killed", ports...)
		if err := e.Restart(); err != nil {
			t.Fatal(err)
		}
	}
	if err := e.Close(); err != nil {
		t.Fatal(err)
	}
	if len(e.reserved) != 0 {
		t.Errorf("%d ports kept by a closed engine", len(e.reserved))
	}
}
