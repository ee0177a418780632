"""What an operator imports: rules, alerts and dashboards, written from the names in ``semconv``.

========================  ==============================================================================================
``settings``              what can be chosen, by name, with its default: ``--set idle_kwh=2``
``promql``                names and the few expressions that everything is built of
``recording``             recording rules: W, J per 1,000 tokens, shares of requests over budget, showback by day
``alerts``                alert rules, each with its page in docs/runbooks/
``budgets``               budgets out of what a Prometheus has seen
``queries``               what dashboards ask for
``panels``                panels as this project draws them, by Grafana's foundation SDK
``dashboards``            Overview, Models, Hosts and GPUs, Showback, Health
``stack``                 a collector, a store of traces, everything together as a compose file
``files``                 all of it as files, as they stand in ``deploy/``
========================  ==============================================================================================
"""
