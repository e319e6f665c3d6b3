// SPDX-License-Identifier: Apache-2.0

package pool

import (
	"math"
	"net/netip"
	"testing"
)

func TestWarm(t *testing.T) {
	var w Warm
	for _, slot := range []uint32{0, 63, 64, maxWarmSlots - 1} {
		if w.Has(slot) {
			t.Errorf("slot %d is warm from the start", slot)
		}
		w.Add(slot)
		w.Add(slot)
		if !w.Has(slot) || w.Has(slot+1) {
			t.Errorf("slot %d: %v, the one after it: %v", slot, w.Has(slot), w.Has(slot+1))
		}
		w.Forget(slot)
		w.Forget(slot)
		if w.Has(slot) {
			t.Errorf("slot %d is still warm", slot)
		}
	}
	for _, slot := range []uint32{maxWarmSlots, math.MaxUint32} { // beyond the bound nothing is remembered
		w.Add(slot)
		w.Forget(slot)
		if w.Has(slot) {
			t.Errorf("slot %d is warm", slot)
		}
	}
}

func TestForgetSlotReachesAllThatLive(t *testing.T) {
	endpoints := make([]*Endpoint, 3)
	for i := range endpoints {
		endpoints[i] = &Endpoint{Addr: netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(i)), State: &State{Slot: uint32(i)}}
		endpoints[i].Warm.Add(7)
		endpoints[i].Warm.Add(8)
	}
	NewSnapshot(1, true, endpoints).ForgetSlot(7)
	for i, e := range endpoints {
		if e.Warm.Has(7) || !e.Warm.Has(8) {
			t.Errorf("endpoint %d: warm with 7 %v, with 8 %v", i, e.Warm.Has(7), e.Warm.Has(8))
		}
	}
}

func TestParseTensorParallel(t *testing.T) {
	for value, want := range map[string]int{"": 0, "1": 1, "8": 8, "0": 0, "-1": 0, "x": 0, "8 ": 0, "65536": 0, "99999999999999999999": 0, "1.5": 0} {
		if got := ParseTensorParallel(value); got != want {
			t.Errorf("%q: %d, want %d", value, got, want)
		}
	}
}
