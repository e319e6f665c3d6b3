// SPDX-License-Identifier: Apache-2.0

package sidecar

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"syscall"

	"github.com/baton-epp/baton/sidecar/connectors"
)

// How an attempt ended. The values are metric labels and end the name of an outcome.
const (
	reasonOK             = "ok"
	reasonRefused        = "refused"         // no connection
	reasonConnectTimeout = "connect_timeout" // no connection in time
	reasonTLS            = "tls"             // no connection that can be trusted
	reasonReset          = "reset"           // the connection broke
	reasonTimeout        = "timeout"         // no answer in time
	reasonSaturated      = "saturated"       // no free slot in time; nothing was sent
	reason5xx            = "status_5xx"
	reasonOverloaded     = "overloaded" // 408, 425, 429
	reasonNotFound       = "not_found"  // 404: the model is not there
	reasonRejected       = "rejected"   // another 4xx: the request is at fault, or our edit of it
	reasonMalformed      = "malformed"  // no HTTP, an unexpected status, no JSON
	reasonEngineError    = "engine_error"
	reasonTooLarge       = "too_large"
	reasonComplete       = "complete" // generation ended with the first token: no handle, and none needed
	reasonMissing        = "handle_missing"
	reasonIncomplete     = "handle_incomplete"
	reasonExpired        = "handle_expired"
	reasonGone           = "gone" // left the pool in the meantime
	reasonCanceled       = "canceled"
	reasonBudget         = "budget"

	// Of a question to decode only.
	reasonCached    = "cached"     // it holds enough of the prompt
	reasonNotCached = "not_cached" // it does not

	reasonNoEncoder = "no_encoder" // of phase errors only: none of those ranked could be tried

	// Of fallbacks only.
	reasonNoPrefiller    = "no_prefiller" // none of those ranked could be tried
	reasonUsed           = "handle_used"
	reasonEngineMismatch = "engine_mismatch" // decode was picked anew and reads other handles
	reasonDecodeChanged  = "decode_changed"  // decode was picked anew and has no sidecar
)

// Reasons lists every value of Attempt.Reason of the phases encode and prefill. A question to decode ends as cached or
// not_cached instead of ok.
func Reasons() []string {
	return []string{
		reasonOK, reasonRefused, reasonConnectTimeout, reasonTLS, reasonReset, reasonTimeout, reasonSaturated, reason5xx,
		reasonOverloaded, reasonNotFound, reasonRejected, reasonMalformed, reasonEngineError, reasonTooLarge,
		reasonComplete, reasonMissing, reasonIncomplete, reasonExpired, reasonGone, reasonCanceled, reasonBudget,
	}
}

// questionReasons lists every way in which a question to decode ends.
func questionReasons() []string { return append(Reasons()[1:], reasonCached, reasonNotCached) }

// FallbackReasons lists every reason that an outcome may be named after.
func FallbackReasons() []string {
	return append(Reasons()[1:], reasonNoPrefiller, reasonUsed, reasonEngineMismatch, reasonDecodeChanged)
}

// sequel is what follows an attempt that ended for a reason (docs/design.md 3.5).
type sequel struct {
	next  bool // another prefiller may do better
	blame bool // the endpoint is at fault: told to its breaker and health
	alone bool // decode goes on alone even under onFailure fail: prefill did its part, or decode knows the answer
}

func sequelOf(reason string) sequel {
	switch reason {
	case reasonRefused, reasonConnectTimeout, reasonTLS, reasonReset, reasonTimeout, reason5xx, reasonMalformed,
		reasonEngineError:
		return sequel{next: true, blame: true}
	case reasonSaturated, reasonOverloaded, reasonNotFound, reasonExpired, reasonGone:
		return sequel{next: true}
	case reasonRejected, reasonComplete, reasonMissing, reasonIncomplete, reasonTooLarge:
		return sequel{alone: true}
	default:
		return sequel{}
	}
}

func reasonOfStatus(status int) string {
	switch {
	case status == http.StatusOK:
		return reasonOK
	case status >= http.StatusInternalServerError:
		return reason5xx
	case status == http.StatusNotFound:
		return reasonNotFound
	case status == http.StatusRequestTimeout, status == http.StatusTooEarly, status == http.StatusTooManyRequests:
		return reasonOverloaded
	case status >= http.StatusBadRequest:
		return reasonRejected
	default:
		return reasonMalformed
	}
}

func reasonOfVerdict(v connectors.Verdict) string {
	switch v {
	case connectors.Ready:
		return reasonOK
	case connectors.Complete:
		return reasonComplete
	case connectors.Missing:
		return reasonMissing
	case connectors.Incomplete:
		return reasonIncomplete
	case connectors.Failed:
		return reasonEngineError
	default:
		return reasonMalformed
	}
}

// reasonOfError tells what broke an exchange whose context has not ended.
func reasonOfError(err error) string {
	if errors.Is(err, errNotInPool) {
		return reasonGone
	}
	if op, ok := errors.AsType[*net.OpError](err); ok && op.Op == "dial" {
		if op.Timeout() {
			return reasonConnectTimeout
		}
		return reasonRefused
	}
	if isTLS(err) {
		return reasonTLS
	}
	for _, broken := range []error{
		io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET, syscall.EPIPE, syscall.ECONNABORTED, net.ErrClosed,
		os.ErrDeadlineExceeded, errReplayed,
	} {
		if errors.Is(err, broken) {
			return reasonReset
		}
	}
	if _, ok := errors.AsType[*net.OpError](err); ok {
		return reasonReset
	}
	if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() {
		return reasonConnectTimeout // of the TLS handshake
	}
	return reasonMalformed
}

func isTLS(err error) bool {
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return true
	}
	if _, ok := errors.AsType[tls.AlertError](err); ok {
		return true
	}
	_, ok := errors.AsType[tls.RecordHeaderError](err)
	return ok
}
