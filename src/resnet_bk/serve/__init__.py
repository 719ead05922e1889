"""A server of texts over HTTP, ``resnet-bk serve``: one engine decodes the texts of all clients together.

``command.py`` loads a model and listens, ``app.py`` has the addresses, ``requests.py`` what clients may ask,
``answers.py`` what they get, ``page.py`` the page. ``texts.py`` is one text, ``scheduler.py`` the thread that decodes,
``metrics.py`` what is counted.
"""
