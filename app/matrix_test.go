// SPDX-License-Identifier: Apache-2.0

package app

import (
	"slices"
	"testing"

	procv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ext_proc/v3"

	"github.com/baton-epp/baton/internal/gatewaytest"
)

// TestFailureMatrix takes every line of docs/design.md 3.5 and 5.2 through the whole picker, for every wire, streamed and
// not, with request bodies FULL_DUPLEX_STREAMED and BUFFERED, against simulated engines. After each cell nothing may be
// held anywhere, and what leaked is what was counted.
func TestFailureMatrix(t *testing.T) {
	t.Parallel()
	for _, f := range flavours(t) {
		for _, r := range rows() {
			if r.applies != nil && !r.applies(f) {
				continue
			}
			for _, mode := range []procv3.ProcessingMode_BodySendMode{gatewaytest.Duplex, gatewaytest.Buffered} {
				for _, streamed := range []bool{false, true} {
					t.Run(cellName(f, &r, mode, streamed), func(t *testing.T) {
						t.Parallel()
						r := r
						r.faults = slices.Clone(r.faults) // delays are scaled for each cell
						s := newScenario(t, f, &r, mode, streamed)
						s.setFaults("prefill", r.faults...)
						s.setFaults("decode", r.decode...)
						if r.run != nil {
							r.run(s)
							return
						}
						reply, err := s.do(t.Context())
						s.check(reply, err, r.want(f))
					})
				}
			}
		}
	}
}

func cellName(f *flavour, r *row, mode procv3.ProcessingMode_BodySendMode, streamed bool) string {
	name := f.name + "/" + r.name + "/" + map[procv3.ProcessingMode_BodySendMode]string{
		gatewaytest.Duplex: "duplex", gatewaytest.Buffered: "buffered",
	}[mode]
	if streamed {
		return name + "/streamed"
	}
	return name + "/whole"
}
