// SPDX-License-Identifier: Apache-2.0

package connectors

import (
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/baton-epp/baton/pool"
)

// TestSnowflake gives out ids that are all different and in the range of global ones, whatever the clock says.
func TestSnowflake(t *testing.T) {
	const each = 10_000
	var ids [4][]int64
	var wg sync.WaitGroup
	for i := range ids {
		wg.Go(func() {
			now := time.Now()
			for range each {
				ids[i] = append(ids[i], newSnowflake(now)) // more than a millisecond holds
			}
		})
	}
	wg.Wait()
	all := slices.Concat(ids[:]...)
	for i := range ids {
		if !slices.IsSorted(ids[i]) {
			t.Error("not in order")
		}
	}
	all = append(all, newSnowflake(time.Time{}), newSnowflake(time.Unix(0, 0)))
	slices.Sort(all)
	if n := len(slices.Compact(slices.Clone(all))); n != len(all) {
		t.Errorf("%d of %d differ", n, len(all))
	}
	if all[0] < 1<<42 {
		t.Errorf("from %d to %d", all[0], all[len(all)-1])
	}
}

func TestUUID(t *testing.T) {
	a, b := newUUID(), newUUID()
	if a == b || !uuid.MatchString(a) || len(a) != 36 {
		t.Errorf("%s, %s", a, b)
	}
}

// TestPorts takes a label for a port only if it is one.
func TestPorts(t *testing.T) {
	f := func(label string, want int) {
		t.Helper()
		e := &pool.Endpoint{Labels: map[string]string{P2PPortLabel: label}}
		if got := port(e, P2PPortLabel, 5710); got != want {
			t.Errorf("%q: %d, want %d", label, got, want)
		}
	}
	f("7777", 7777)
	f("1", 1)
	f("65535", 65535)
	for _, label := range []string{"", "0", "65536", "-1", "+1", "5e3", "http", " 7777", "7777\"", "99999999999999999999"} {
		f(label, 5710)
	}
	if got := port(&pool.Endpoint{}, P2PPortLabel, 5710); got != 5710 {
		t.Errorf("no labels: %d", got)
	}
	for addr, want := range map[string]string{
		"10.0.0.9:80": "10.0.0.9", "[fd00::9]:80": "fd00::9", "[fe80::1%eth0]:80": "fe80::1", "[::ffff:10.0.0.9]:80": "10.0.0.9",
	} {
		if got := hostOf(&pool.Endpoint{Addr: netip.MustParseAddrPort(addr)}); got != want {
			t.Errorf("%s: %s, want %s", addr, got, want)
		}
	}
}
