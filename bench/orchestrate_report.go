// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"strings"
	"time"
)

// orchestrated are the results of an orchestration.
type orchestrated struct {
	machine machine
	o       *orchestration
	took    time.Duration

	handP50, handP99                                 []float64 // µs, one per round
	withP50, withP99                                 []float64
	cpu, plainCPU                                    []float64
	aloneP50, aloneP99, floorP50, floorP99, floorCPU []float64
	idlePeak, heldPeak                               int64
	heldSeen                                         int
	heldBytes                                        int64
}

func (r *orchestrated) add(hand, with []time.Duration, cpu, plain time.Duration) {
	r.handP50, r.handP99 = append(r.handP50, micros(percentile(hand, .5))), append(r.handP99, micros(percentile(hand, .99)))
	r.withP50, r.withP99 = append(r.withP50, micros(percentile(with, .5))), append(r.withP99, micros(percentile(with, .99)))
	r.cpu, r.plainCPU = append(r.cpu, micros(cpu)), append(r.plainCPU, micros(plain))
}

// addFloor adds a round of decode alone: by hand, and through an ext_proc server that does nothing.
func (r *orchestrated) addFloor(alone, floor []time.Duration, cpu time.Duration) {
	r.aloneP50, r.aloneP99 = append(r.aloneP50, micros(percentile(alone, .5))), append(r.aloneP99, micros(percentile(alone, .99)))
	r.floorP50, r.floorP99 = append(r.floorP50, micros(percentile(floor, .5))), append(r.floorP99, micros(percentile(floor, .99)))
	r.floorCPU = append(r.floorCPU, micros(cpu))
}

// differences subtracts pair by pair.
func differences(of, by []float64) []float64 {
	out := make([]float64, 0, len(of))
	for i := range min(len(of), len(by)) {
		out = append(out, of[i]-by[i])
	}
	return out
}

func (r *orchestrated) text() string {
	var b strings.Builder
	o := r.o
	fmt.Fprintf(&b, "# What orchestration costs, %s\n\n", time.Now().UTC().Format(time.DateOnly))
	for _, l := range r.machine.lines() {
		fmt.Fprintf(&b, "- %s\n", l)
	}
	fmt.Fprintf(&b, "\nTwo prefill and two decode endpoints of `baton simulate` that take no time of their own; %.0f requests a second, evenly spaced, prompts of %d bytes, no faults. "+
		"By hand: one client makes the prefill call, cuts out the handle, and makes the decode call. Baton: the same client asks Baton over ext_proc, which makes the prefill call, and then makes the decode call itself. Everything shares the machine.\n\n", o.rate, o.body)
	us := func(v []float64) string { return showSpread(spreadOf(v), "%.0f µs") }
	fmt.Fprintf(&b, "| | p50 | p99 |\n|---|---|---|\n")
	fmt.Fprintf(&b, "| both calls by hand | %s | %s |\n", us(r.handP50), us(r.handP99))
	fmt.Fprintf(&b, "| through Baton | %s | %s |\n", us(r.withP50), us(r.withP99))
	total50, total99 := differences(r.withP50, r.handP50), differences(r.withP99, r.handP99)
	floor50, floor99 := differences(r.floorP50, r.aloneP50), differences(r.floorP99, r.aloneP99)
	fmt.Fprintf(&b, "| added in all | %s | %s |\n", us(total50), us(total99))
	fmt.Fprintf(&b, "| decode alone, by hand | %s | %s |\n", us(r.aloneP50), us(r.aloneP99))
	fmt.Fprintf(&b, "| decode alone, through an ext_proc server that does nothing | %s | %s |\n", us(r.floorP50), us(r.floorP99))
	fmt.Fprintf(&b, "| added by ext_proc itself | %s | %s |\n", us(floor50), us(floor99))
	fmt.Fprintf(&b, "| added by Baton beyond that (target: under %v and %v) | %s | %s |\n\n", addedP50Target, addedP99Target,
		us(differences(total50, floor50)), us(differences(total99, floor99)))
	fmt.Fprintf(&b, "| CPU of the ext_proc server per request | |\n|---|---|\n| Baton with prefill | %s |\n| Baton without | %s |\n| ratio (target: under %.0f) | %s |\n| the server that does nothing | %s |\n\n",
		us(r.cpu), us(r.plainCPU), cpuRatioTarget, showSpread(spreadOf(ratios(r.cpu, r.plainCPU)), "%.2f"), us(r.floorCPU))
	if o.held > 0 {
		fmt.Fprintf(&b, "Held: %d of %d requests of %d bytes waiting for their prefill, %s of bodies counted; peak memory %s (target: under %s), %s before them.\n\n",
			r.heldSeen, o.held, o.heldBody, showBytes(r.heldBytes), showBytes(r.heldPeak), showBytes(heldTarget), showBytes(r.idlePeak))
	}
	fmt.Fprintf(&b, "Median (min–max) of %d rounds of %v for each part; differences and ratios are taken round by round. Took %v.\n", o.rounds, o.round, r.took.Round(time.Second))
	return b.String()
}
