// SPDX-License-Identifier: Apache-2.0

package app

import (
	"bytes"
	"context"
	"crypto/sha256"
	"log/slog"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/baton-epp/baton/config"
	"github.com/baton-epp/baton/sidecar"
)

// configPoll is how often the configuration's content is compared. Content, not modification time: a ConfigMap mount
// swaps a symlink.
const configPoll = time.Second

// configMetrics tell whether the configuration on disk is the one in force.
type configMetrics struct {
	bad     prometheus.Gauge
	reloads prometheus.Counter
}

func newConfigMetrics(r prometheus.Registerer) configMetrics {
	m := configMetrics{
		bad:     prometheus.NewGauge(prometheus.GaugeOpts{Name: "baton_app_config_bad", Help: "1 while the configuration file on disk is not the one in force because it has errors."}),
		reloads: prometheus.NewCounter(prometheus.CounterOpts{Name: "baton_app_config_reloads_total", Help: "Times a changed configuration was put into force."}),
	}
	r.MustRegister(m.bad, m.reloads)
	return m
}

// watchConfig reads the configuration file again when its content changes and puts its disaggregation section into force,
// the kill switch among it. Other sections need a restart, which the log says. A bad file keeps the old one.
func (a *App) watchConfig(ctx context.Context, m configMetrics) {
	tick := time.NewTicker(configPoll)
	defer tick.Stop()
	last := a.configSum
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		text, err := os.ReadFile(a.opts.ConfigFile)
		if err != nil {
			continue // in the middle of a swap, or gone: what is in force stays
		}
		sum := sha256.Sum256(text)
		if bytes.Equal(sum[:], last[:]) {
			continue
		}
		last = sum
		if err := a.reload(text); err != nil {
			m.bad.Set(1)
			a.log.Error("configuration not reloaded, the old one stays", slog.Any("err", err))
			continue
		}
		m.bad.Set(0)
		m.reloads.Inc()
	}
}

// reload validates the whole file and swaps what can be swapped while serving.
func (a *App) reload(text []byte) error {
	next, err := config.Load(a.opts.ConfigFile, text)
	if err != nil {
		return err
	}
	if _, err := checkParts(next, a.opts.ConfigFile, a.opts.Plugins); err != nil {
		return err
	}
	if err := a.orchestrator.Reload(next.Disaggregation); err != nil {
		return err
	}
	a.warn(sidecar.Warnings(&next.Disaggregation))
	a.log.Info("configuration reloaded: disaggregation is in force but for pairLabels; other sections need a restart", slog.String("mode", next.Disaggregation.Mode))
	return nil
}
