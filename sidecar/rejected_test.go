// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"errors"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/baton-epp/baton/inference"
	"github.com/baton-epp/baton/pool"
)

// TestRejectedLegLeavesTheAnswerToDecode: a request that prefill rejects is forwarded all the same, since decode is about
// to reject it, too, in words for the client; where it does not, the request ends a little later.
func TestRejectedLegLeavesTheAnswerToDecode(t *testing.T) {
	for _, decodeAnswers := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t, nil)
			r.settings.Load().wires[""] = wire{meeting{newRooms()}, waiting()}
			net := r.bubble()
			pe, d := net.server("p", status(http.StatusBadRequest)), net.server("d", func(http.ResponseWriter, *http.Request) {})
			d.Role = pool.RoleDecode
			j := r.job(inference.Completions, clientBody, d, pe)
			out, err := r.Run(t.Context(), j)
			if err != nil {
				t.Fatal(err)
			}
			synctest.Wait() // prefill has answered
			if pe.Load.Requests() != 0 {
				t.Error("a prefill that is over counts as load")
			}
			if err := r.Forward(t.Context(), j, out, d); err != nil || out.Name != "disaggregated" {
				t.Fatalf("%+v, %v", out, err)
			}
			start := time.Now()
			if decodeAnswers {
				r.Transferred(t.Context(), out, d, true)
				r.Leave(j, out, false) // of a response that is an error
				if time.Since(start) != 0 || out.Pending() != nil || reasons(out) != "rejected" {
					t.Errorf("%v, %s", time.Since(start), reasons(out))
				}
			} else {
				<-out.Pending()
				err := r.Settle(t.Context(), j, out)
				if pe, ok := errors.AsType[*PhaseError](err); !ok || pe.Reason != "rejected" || time.Since(start) != rejectedFor {
					t.Errorf("%v after %v", err, time.Since(start))
				}
				r.Leave(j, out, false)
			}
			r.background.Wait()
			r.idle()
			aborts := 1.0
			if decodeAnswers {
				aborts = 0
			}
			r.want(aborts, "aborts_total")
			r.want(1, "attempts_total", "prefill", "rejected")
		})
	}
}
